"""The files that no source byte goes into as it is: index, model card, manifest and config, written last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace

from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX, MANIFEST, README
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import NvfpPrepError, TargetError
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.results import make_index
from nvfp4_prep.prepared.manifest import FileRecord, Manifest
from nvfp4_prep.prepared.manifest_values import MADE
from nvfp4_prep.prepared.model_card import is_model_card, make_model_card
from nvfp4_prep.prepared.served_config import expected_config

__all__ = ["MADE_FILES", "made_outlines", "write_made_files"]

MADE_FILES = (INDEX, README, MANIFEST, CONFIG)
"""In the order of writing: without the last two a directory is not a checkpoint."""


def made_outlines(served: Callable[[], Iterable[TensorRecord]], config: Callable[[], bytes]) -> dict[str, Outline]:
    """Return the outlines of the made files, by name.

    Args:
        served: returns the tensors that the index lists.
        config: returns the config's bytes.
    """
    return {
        INDEX: Outline(whole=lambda: make_index(served())),
        README: Outline(accepts=is_model_card),
        MANIFEST: Outline(accepts=_is_manifest),
        CONFIG: Outline(whole=config),
    }


def _is_manifest(raw: bytes) -> bool:
    try:
        Manifest.from_bytes(raw, MANIFEST)
    except NvfpPrepError:
        return False
    return True


def write_made_files(
    target: Target,
    draft: Manifest,
    served: Iterable[TensorRecord],
    accept: Callable[[Manifest], None] = lambda manifest: None,
) -> Manifest:
    """Write the last files and finish the target.

    Args:
        target: holds all other files.
        draft: the manifest, with those files.
        served: the tensors that the index lists.
        accept: looks at the whole before the config is there; if it raises, the target stays unfinished.

    Returns:
        The manifest as it was written, with the made files in it.
    """
    texts = {INDEX: make_index(served), README: make_model_card(draft), CONFIG: expected_config(draft)}
    made = {name: FileRecord(len(text), hashlib.sha256(text).hexdigest(), MADE) for name, text in texts.items()}
    manifest = replace(draft, files={**draft.files, **made})
    texts[MANIFEST] = _manifest_text(target, manifest)
    target.remove_file(CONFIG, texts[CONFIG])  # of a run that was killed after it, and may be judged anew
    target.check_files()
    for name in MADE_FILES:
        if name == CONFIG:
            accept(manifest)
            target.check_files()
        target.write_file(name, texts[name])
    target.finish()
    return manifest


def _manifest_text(target: Target, manifest: Manifest) -> bytes:
    """Return the manifest's bytes.

    Raises:
        TargetError: if no reader would take them: the journal was damaged in a way that no line shows.
    """
    try:
        text = manifest.to_bytes()
        Manifest.from_bytes(text, MANIFEST)
    except (KeyError, NvfpPrepError) as error:
        what = error.what if isinstance(error, NvfpPrepError) else f"{error} is missing"
        raise TargetError(
            f"the finished files of an earlier run do not fit together ({what})",
            where=str(target.path),
            next_step="The journal in its work folder was damaged: use --restart.",
        ) from error
    return text
