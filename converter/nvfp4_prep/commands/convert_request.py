"""A conversion as one value: everything that may be asked for together, and the rules of what may not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nvfp4_prep._util.arguments import ADDRESS, DEVICE, FLAG, PATH, TEXT, check_fields, instance, optional
from nvfp4_prep.errors import UsageError
from nvfp4_prep.hub.publish_options import PublishOptions, check_repository
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.layer_selection import LayerSelection, part_folder
from nvfp4_prep.output.report_file import check_report_path

__all__ = ["ConvertRequest"]


@dataclass(frozen=True)
class ConvertRequest:
    """Arguments of ``nvfp4-prep convert``, checked.

    Attributes:
        source: a directory or a Hub id.
        target: the output directory.
        options: what the output's bytes depend on.
        dry_run: only plan, and look at the target.
        layers: one machine's part, as :meth:`~nvfp4_prep.output.layer_selection.LayerSelection.parse` takes it.
        join: make the checkpoint of all parts.
        push_to: repository to publish to meanwhile.
        publish_options: how to publish.
        stream_out: delete what is published.
        device: ``cpu`` or ``cuda``.
        smoke: whether the smoke run at the end is made.
        report: HTML page about the smoke run.
        restart: discard an unfinished earlier run.
    """

    source: str | Path
    target: Path
    options: ConvertOptions = field(default_factory=ConvertOptions)
    dry_run: bool = False
    layers: str | None = None
    join: bool = False
    push_to: str | None = None
    publish_options: PublishOptions = field(default_factory=PublishOptions)
    stream_out: bool = False
    device: str = "cpu"
    smoke: bool = True
    report: Path | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        """Check the types; :meth:`check` says what excludes each other."""
        flags = ("dry_run", "join", "stream_out", "smoke", "restart")
        check_fields(
            self,
            source=ADDRESS,
            target=PATH,
            options=instance(ConvertOptions),
            layers=optional(TEXT),
            push_to=optional(TEXT),
            publish_options=instance(PublishOptions),
            device=DEVICE,
            report=optional(PATH),
            **dict.fromkeys(flags, FLAG),
        )

    def check(self) -> None:
        """Raise :class:`UsageError` for what excludes each other, and for a report that could not be written."""
        divided = self.join or self.layers is not None
        if self.push_to is None and (self.stream_out or self.publish_options != PublishOptions()):
            raise UsageError(
                "--stream-out, --private, --revision and --create-pr say how to publish, but not where",
                next_step="Add --push-to USER/NAME.",
            )
        if self.layers is not None and self.join:
            raise UsageError("--layers makes one part, --join takes all", next_step="Use one of them.")
        if self.push_to is not None and divided:
            raise UsageError(
                "--push-to publishes while one machine converts, parts come from several",
                next_step="Join first, then use nvfp4-prep push.",
            )
        if self.join and self.restart:
            raise UsageError("--restart would discard what --join is to take", next_step="Leave one of them out.")
        if self.device != "cpu" and divided:
            raise UsageError("parts are prepared on the CPU", next_step="Leave --device out.")
        self._check_report()
        if self.push_to is not None:
            check_repository(self.push_to)

    def _check_report(self) -> None:
        if self.report is None:
            return
        if not self.smoke or self.stream_out or self.dry_run or self.layers is not None:
            raise UsageError(
                "--report is about the smoke test, and these options leave none",
                next_step="Leave --report out, or what goes without: --no-smoke, --stream-out, --dry-run, --layers.",
            )
        check_report_path(self.report, self.target, self.source)

    @property
    def selection(self) -> LayerSelection | None:
        """The layers of a part; raises :class:`UsageError` for what does not name layers."""
        return None if self.layers is None else LayerSelection.parse(self.layers)

    @property
    def work_folder(self) -> Path | None:
        """The folder that the conversion works in, where downloads lie; ``None`` if it writes nothing."""
        if self.dry_run:
            return None
        return self.target if (part := self.selection) is None else part_folder(self.target, part)
