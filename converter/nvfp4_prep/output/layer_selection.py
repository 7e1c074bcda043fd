"""Selection of a part's layers, and the folder in which the part works: ``TARGET/.nvfp4_prep/parts/NAME``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nvfp4_prep._util.text import spans
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import UsageError
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_checks import PARTS_FOLDER
from nvfp4_prep.output.target_root import TargetRoot, check_work_folder

__all__ = ["LayerSelection", "discard_parts", "list_parts", "part_folder"]

_RANGES = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?(,[0-9]{1,18}(-[0-9]{1,18})?)*")
_SHARE = re.compile(r"([0-9]{1,18})/([0-9]{1,18})")
_NAME_LENGTH = 200
"""A folder name holds the text of the selection; file systems take 255 bytes."""


@dataclass(frozen=True)
class LayerSelection:
    """Layers of a part, by their numbers in the model (``1-20``, ``3,7-9``) or as a share of all (``2/8``).

    Attributes:
        text: as :meth:`parse` takes it, in a normal form.
        ranges: first and last layer of each range; empty for a share.
        share: number, from 1, and count of equal shares; ``None`` for ranges.
    """

    text: str
    ranges: tuple[tuple[int, int], ...] = ()
    share: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``1-20``, ``3,7-9`` or ``2/8``; blanks around commas do not count.

        Raises:
            UsageError: if it is none of these, a range runs backwards or a share is not within its count.
        """
        text = ",".join(item.strip() for item in text.split(","))
        share = _SHARE.fullmatch(text)
        if share is not None:
            number, count = int(share[1]), int(share[2])
            if not 1 <= number <= count:
                raise UsageError(f"share {text} of the layers does not exist", next_step="Shares go from 1/N to N/N.")
            return cls(f"{number}/{count}", share=(number, count))
        if not _RANGES.fullmatch(text):
            raise UsageError(
                f"{text!r} names no layers", next_step="Write --layers 1-20, --layers 3,7-9 or --layers 2/8."
            )
        ranges = []
        for item in text.split(","):
            first, _, last = item.partition("-")
            ranges.append((int(first), int(last or first)))
        if any(first > last for first, last in ranges):
            raise UsageError(f"--layers {text} runs backwards", next_step="Write the lower layer first.")
        ranges.sort()
        return cls(",".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges), ranges=tuple(ranges))

    @property
    def folder_name(self) -> str:
        """A file name that :meth:`from_folder_name` reads; raises :class:`UsageError` where it would be too long."""
        if len(self.text) > _NAME_LENGTH:
            raise UsageError(
                "--layers has too many numbers for one part", next_step="Write ranges (1-20) or shares (2/8)."
            )
        return "share-" + self.text.replace("/", "-of-") if self.share else "layers-" + self.text

    @classmethod
    def from_folder_name(cls, name: str) -> Self:
        """Return the inverse of :attr:`folder_name`; raises :class:`UsageError` for another name."""
        kind, _, text = name.partition("-")
        return cls.parse(text.replace("-of-", "/") if kind == "share" else text if kind == "layers" else name)

    def choose(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return the selected ones of the model's MoE layers, in rising order; shares differ by one layer at most."""
        present = sorted(set(layers))
        if self.share is not None:
            number, count = self.share
            return tuple(present[(number - 1) * len(present) // count : number * len(present) // count])
        return tuple(layer for layer in present if any(first <= layer <= last for first, last in self.ranges))

    def choose_present(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Choose as :meth:`choose`; raise :class:`UsageError` if a number is not a layer or nothing is selected."""
        present = sorted(set(layers))
        chosen = self.choose(present)
        for first, last in self.ranges:
            if sum(first <= layer <= last for layer in chosen) != last - first + 1:
                raise UsageError(
                    f"--layers {self.text}: not all of these are prepared layers",
                    expected=f"layers among {spans(present)}",
                )
        if not chosen:
            raise UsageError(f"--layers {self.text} selects none of the prepared layers", expected=f"{spans(present)}")
        return chosen


def part_folder(target: Path, selection: LayerSelection) -> Path:
    """Return the folder in which the part of these layers works."""
    return target / WORK_FOLDER / PARTS_FOLDER / selection.folder_name


def list_parts(target: Path) -> dict[str, Path]:
    """Return parts that were begun, by the text of their selection."""
    check_work_folder(target / WORK_FOLDER, (), (PARTS_FOLDER,))
    folder = target / WORK_FOLDER / PARTS_FOLDER
    if not folder.is_dir():
        return {}
    check_work_folder(folder, (), ())
    paths = sorted(path for path in folder.iterdir() if path.is_dir())
    return {LayerSelection.from_folder_name(path.name).text: path for path in paths}


def discard_parts(target: Path, outlines_of: Callable[[LayerSelection], Mapping[str, Outline]]) -> None:
    """Delete all parts.

    Args:
        target: the whole conversion's output directory.
        outlines_of: see :meth:`~nvfp4_prep.output.target.Target.check_names`.

    Raises:
        BusyError: if one is at work; those before it are gone.
        TargetError: if one holds a file that no run wrote, or that was changed since then.
    """
    for text, path in list_parts(target).items():
        outlines = outlines_of(LayerSelection.parse(text))
        with Target.open(path, {}, restart=True) as part:
            part.check_names(outlines, outlines)
            part.finish()
        with TargetRoot.open(path.parent) as parts:
            parts.remove_tree(path.name)
