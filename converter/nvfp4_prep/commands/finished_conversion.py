"""Finished targets of a conversion: whether one is what a plan would make, by all that shows without tensor bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from pathlib import Path

from nvfp4_prep._util.text import and_more, first_of
from nvfp4_prep.checkpoint.entry_kind import FILE, entry_kind, kind_step
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.commands.verify import verify
from nvfp4_prep.errors import TargetError, VerificationError
from nvfp4_prep.output.sink import FileSink
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.prepared.directory import odd_manifest
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.manifest_values import SIDE
from nvfp4_prep.prepared.problems import renewal

__all__ = ["check_undamaged", "find_complete", "read_manifest"]


def find_complete(path: Path, plan: Plan, sink: FileSink) -> Manifest | None:
    """Return the manifest, if the target is already what the plan would make; ``None`` if it is not finished.

    Raises:
        TargetError: if it is a finished conversion of something else, or its files are not all there.
        VerificationError: if it is damaged otherwise, by manifest, stamp, sizes, headers and index.
    """
    if has_journal(path):
        return None
    if (odd := odd_manifest(path)) is not None:
        raise TargetError(odd[0], where=str(path), next_step=odd[1])
    if not (path / MANIFEST).is_file():
        return None
    if not (path / CONFIG).is_file():
        raise TargetError(
            f"holds a prepared checkpoint without its {CONFIG}", where=str(path), next_step=renewal(CONFIG)
        )
    manifest = read_manifest(path)
    differences = _differences(manifest, plan)
    if differences:
        raise TargetError(
            f"holds a finished conversion of something else or with other options: {'; '.join(differences)}",
            where=str(path),
            next_step="Give another target, or remove it.",
        )
    changed = _source_changes(manifest, plan)
    if changed:
        raise TargetError(
            "holds a finished conversion of something else: its source had the same name, and differs in"
            f" {'; '.join(changed)}",
            where=str(path),
            next_step="Give another target, or remove it.",
        )
    all_here = True
    for file in plan.files:
        there, sha256 = path / file.name, manifest.files[file.name].sha256
        if not sink.holds(file.name, file.nbytes, sha256):
            _check_size(there, file.nbytes)
        all_here = all_here and there.is_file()
    if all_here:  # of files that were published and deleted, the Hub's listing is compared when publishing ends
        check_undamaged(path)
    return manifest


def check_undamaged(path: Path) -> None:
    """Raise :class:`VerificationError` if a finished target is damaged, as far as that shows without tensor bytes."""
    report = verify(path, quick=True)
    if report.problems:
        more = and_more(len(report.problems) - 1, "problem")
        raise VerificationError(
            f"is finished, but damaged: {report.problems[0]}{more}",
            where=str(path),
            next_step=report.next_step,
        )


def _source_changes(manifest: Manifest, plan: Plan) -> list[str]:
    """Return the differences between a finished conversion's source and the plan's, one text each.

    By configs, files and scalars, which is what was read of the source. Experts that were tuned and quantized anew have
    other scalars; a source that differs in other tensors' values only is not told apart.
    """
    records = {file.name: manifest.files.get(file.name) for file in plan.files}
    sizes = {name: None if record is None else record.nbytes for name, record in records.items()}
    side = {name: record.nbytes for name, record in manifest.files.items() if record.kind == SIDE}
    digests = {key: digest for layer in manifest.layers for key, digest in layer.source_sha256.items()}
    raw = {key: value for layer in plan.layers for key, value in layer.scalars.raw.items()}
    now_side = {file.name: file.nbytes for file in plan.side_files}
    other_scalars = [key for key, value in raw.items() if digests.get(key) != hashlib.sha256(value).hexdigest()]
    other_sizes = sizes != {file.name: file.nbytes for file in plan.files}
    return [
        *_changed_names("added", now_side.keys() - side.keys()),
        *_changed_names("removed", side.keys() - now_side.keys()),
        *_changed_names("size of", {name for name in side.keys() & now_side.keys() if side[name] != now_side[name]}),
        *_changed_names("bytes of", _other_texts(manifest.texts, plan.index.texts)),
        *(["names or shapes of tensors"] if other_sizes else []),
        *_changed_names("values of", set(other_scalars)),
    ]


def _other_texts(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> set[str]:
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _changed_names(how: str, names: Set[str]) -> list[str]:
    return [f"{how} {first_of(sorted(names))}"] if names else []


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a finished target; raises :class:`TargetError` if it cannot be read."""
    raw = read_small_file(path / MANIFEST, TargetError, renewal(MANIFEST))
    return Manifest.from_bytes(raw, str(path / MANIFEST))


def _check_size(path: Path, nbytes: int) -> None:
    """Raise :class:`VerificationError` if a file of a finished output is missing, or is another kind or size."""
    kind = entry_kind(path)
    if kind == FILE and path.lstat().st_size == nbytes:
        return
    raise VerificationError(
        "is finished, but damaged: a file is missing, or is another kind or size of file",
        where=str(path),
        expected=f"{nbytes} bytes",
        actual=f"{path.lstat().st_size} bytes" if kind == FILE else kind,
        next_step=f"{kind_step(kind, renewal(path.name))} nvfp4-prep verify says what else is wrong.",
    )


def _differences(manifest: Manifest, plan: Plan) -> list[str]:
    """Return the differences between a finished conversion and what is asked for, one text each."""
    found = {"source": manifest.source, "revision": manifest.revision, **manifest.options.to_dict()}
    asked = {"source": plan.source_label, "revision": plan.source_revision, **plan.options.to_dict()}
    return [f"{key} is {found.get(key)}, requested {asked[key]}" for key in asked if found.get(key) != asked[key]]
