"""The smoke run that a conversion must pass before its ``config.json``, which makes it a checkpoint, appears."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.arguments import CALLABLE, COUNT, check_fields, one_of, optional
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.errors import ConversionInterrupted, VerificationError
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.smoke.backend_names import BACKENDS
from nvfp4_prep.smoke.backends import choose_backend
from nvfp4_prep.smoke.inputs import LayerDamagedError
from nvfp4_prep.smoke.report import LayerReport, SmokeReport
from nvfp4_prep.smoke.run import LAYER_NUMBERS, check_layers, run_smoke
from nvfp4_prep_kernels import MoeLayout

__all__ = [
    "DEFAULT_SMOKE",
    "FailedScope",
    "SmokeFailedError",
    "SmokePolicy",
    "pass_smoke_run",
]

CPU_EXPERTS = 4
"""Of each layer that is run where no GPU is."""


@dataclass(frozen=True)
class SmokePolicy:
    """Scope of the smoke run at the end of a conversion; does not change the output's bytes.

    Attributes:
        layers: numbers of the layers; by default all on a GPU, and the first, middle and last on a CPU.
        sample: experts of each layer; by default all on a GPU, and four on a CPU.
        backend: ``auto``, ``flashinfer``, ``triton`` or ``torch``.
        on_layer: told of each finished layer, with its number and how many there are.
    """

    layers: tuple[int, ...] | None = None
    sample: int | None = None
    backend: str = "auto"
    on_layer: Callable[[LayerReport, int, int], None] | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            layers=optional(LAYER_NUMBERS),
            sample=optional(COUNT),
            backend=one_of(*BACKENDS),
            on_layer=optional(CALLABLE),
        )

    def check(self, layers: Collection[int], layouts: Collection[MoeLayout]) -> None:
        """Check, before a conversion writes anything, that its smoke run can be made.

        Args:
            layers: numbers of the layers that will be there.
            layouts: theirs.

        Raises:
            UsageError: if a layer does not exist or the backend cannot run here.
        """
        check_layers(self.layers or (), layers)
        choose_backend(self.backend, layouts)


DEFAULT_SMOKE = SmokePolicy()
"""The same from Python as from the command line."""


class SmokeFailedError(VerificationError):
    """The smoke run at the end of a conversion found something wrong; the target has no ``config.json``.

    Attributes:
        report: of the run.
        manifest: of the conversion that failed.
    """

    def __init__(self, path: Path, report: SmokeReport, manifest: Manifest) -> None:
        self.report = report
        self.manifest = manifest
        super().__init__(
            "the smoke test failed: do not serve this checkpoint, report it",
            where=str(path),
            next_step="The same command runs it again; --restart (restart=True) converts anew.",
        )


@dataclass(frozen=True)
class FailedScope:
    """Layers that a smoke run found wrong: a later one passes only if it runs at least these, with these experts.

    Attributes:
        layers: their numbers; ``None`` means every layer.
        samples: sizes of the samples whose experts were run; ``None`` means all experts.
    """

    layers: tuple[int, ...] | None
    samples: tuple[int, ...] | None

    @classmethod
    def parse(cls, verdict: Mapping[str, Any]) -> FailedScope:
        """Read :meth:`to_json`; what is missing or of another type means everything."""
        return cls(_numbers(verdict.get("layers"), 0), _numbers(verdict.get("samples"), 1))

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the journal."""
        return {
            "layers": None if self.layers is None else list(self.layers),
            "samples": None if self.samples is None else list(self.samples),
        }


def _numbers(value: object, least: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    return tuple(value) if all(type(number) is int and number >= least for number in value) else None


def cpu_layers(numbers: Collection[int]) -> tuple[int, ...]:
    """Return the layers that are run where no GPU is: the first, the last and the one in the middle."""
    there = sorted(numbers)
    return tuple(sorted({there[0], there[(len(there) - 1) // 2], there[-1]}))


def pass_smoke_run(
    path: Path,
    manifest: Manifest,
    source: Source | None,
    policy: SmokePolicy,
    due: Sequence[FailedScope] = (),
    note_wrong: Callable[[FailedScope], None] = lambda scope: None,
) -> SmokeReport:
    """Run it on a directory that has everything but perhaps ``config.json``.

    Args:
        path: the directory.
        manifest: what it holds.
        source: compared with if its bytes are on this machine; else the prepared tensors are inverted.
        policy: what is run.
        due: what earlier runs found wrong: run too, whatever the policy says.
        note_wrong: told of every layer that is found wrong, at once: the run may end before its last one.

    Raises:
        SmokeFailedError: if anything is wrong.
        ConversionInterrupted: on Ctrl-C; the run stays due.
    """
    layers, samples = _scope(manifest, policy, due)
    local = source if isinstance(source, LocalSource) else None  # of a source from the Hub, shards may be gone by then

    def on_layer(layer: LayerReport, number: int, total: int) -> None:
        if not layer.passed:
            note_wrong(FailedScope((layer.index,), samples))
        if policy.on_layer is not None:
            policy.on_layer(layer, number, total)

    try:
        report = run_smoke(
            PreparedCheckpoint.open(path, in_work=True),
            local,
            layers=layers,
            sample=samples,
            backend=policy.backend,
            on_layer=on_layer,
        )
    except LayerDamagedError as error:
        note_wrong(FailedScope((error.layer,), None))
        raise
    except KeyboardInterrupt as error:
        raise ConversionInterrupted(
            "interrupted in the smoke test: everything is converted, but config.json waits for it",
            where=str(path),
            next_step="Run the same command again.",
        ) from error
    if not report.passed:
        raise SmokeFailedError(path, report, manifest)
    return report


def _scope(
    manifest: Manifest, policy: SmokePolicy, due: Sequence[FailedScope]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return numbers of layers, and sizes of samples whose experts are all run; ``None`` means all."""
    on_cpu = choose_backend(policy.backend, {layer.layout for layer in manifest.layers}).device.type == "cpu"
    layers, sample = policy.layers, policy.sample
    if on_cpu:
        layers = layers or cpu_layers({record.index for record in manifest.layers})
        sample = sample or CPU_EXPERTS
    wanted = [layers, *(scope.layers for scope in due)]
    sizes = [None if sample is None else (sample,), *(scope.samples for scope in due)]
    return _together(wanted), _together(sizes)


def _together(parts: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Return the numbers of all parts; ``None`` if one of them means everything."""
    found: set[int] = set()
    for part in parts:
        if part is None:
            return None
        found.update(part)
    return tuple(sorted(found))
