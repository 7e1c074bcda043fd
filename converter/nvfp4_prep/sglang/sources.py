"""Files that SGLang lists for a load: what they hold, against what the running server holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_prep.checkpoint.filenames import CONFIG, SAFETENSORS
from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.errors import NvfpPrepError, SourceError
from nvfp4_prep.prepared.stamp import Stamp, stamp_in
from nvfp4_prep.serving import updates
from nvfp4_prep.sglang.source_config import adopted_stamp

__all__ = [
    "check_same_layout",
    "check_same_tensors",
    "folder_of",
    "note_model",
    "remember_directory",
    "remember_listing",
    "served_by_any",
    "served_tensors",
    "serves_prepared",
]

_FOLDER, _FILES, _TENSORS = "nvfp4_prep_folder", "nvfp4_prep_files", "nvfp4_prep_tensors"


@dataclass
class _Server:
    """Prepared models of the server whose arguments count now; a process has one server.

    Attributes:
        args: its arguments.
        prepared: whether it has one.
        tensors: of each that was loaded from local files.
        of_last_stage: of the draft model that the last pipeline stage alone holds; None before they were asked for.
    """

    args: Any = None
    prepared: bool = False
    tensors: list[updates.Tensors] = field(default_factory=list)
    of_last_stage: updates.Tensors | None = None


_server = _Server()


def remember_listing(loader: Any, folder: str, files: Iterable[str]) -> None:
    """Keep what SGLang listed, whose loader does not; the first listing is the model's own."""
    vars(loader).setdefault(_FOLDER, folder)
    setattr(loader, _FILES, tuple(files))


def folder_of(loader: Any, model_config: Any) -> Path | None:
    """Return the local directory that a loader read, also where the model was named by its address on a Hub."""
    folder = Path(str(getattr(loader, _FOLDER, model_config.model_path)))
    return folder if folder.is_dir() else None


def check_same_layout(source: Any) -> None:
    """Raise :class:`ServingError` if weights come from a local directory in another layout than the model's.

    Shapes and names of two layouts are alike, so the tensors alone would not tell.
    """
    model_config = getattr(source, "model_config", None)
    served = None if model_config is None else adopted_stamp(model_config.hf_config)
    directory = Path(str(source.model_or_path))
    if served is not None and (directory / CONFIG).is_file():
        updates.check_same_layout(Stamp.parse(served), updates.read_config(directory), str(directory / CONFIG))


def check_same_tensors(loader: Any, source: Any, resolved: Any = None) -> None:
    """Raise :class:`ServingError` unless the listed files hold the tensors of the model's first load.

    SGLang's models pass over what they do not know, and most do not miss what does not come: weights of another model,
    or half of them, would be served. Only headers are read. The first load is remembered.

    Raises:
        SourceError: if a header is damaged, or a file truncated.
    """
    model_config = getattr(source, "model_config", None)
    if model_config is None or adopted_stamp(model_config.hf_config) is None:
        return
    files = getattr(loader, _FILES, ()) if resolved is None else resolved.weight_files
    if not files or not all(file.endswith(SAFETENSORS) and Path(file).is_file() for file in files):
        return
    found = {record.name: (record.dtype, record.shape) for file in files for record in read_header(Path(file)).tensors}
    updates.check_same_tensors(_remember(model_config, found), found, str(source.model_or_path))


def remember_directory(model_config: Any) -> None:
    """Keep the tensors of a local directory whose model starts with dummy weights in their place.

    Without its files, which SGLang does not need for that, nothing is known of them.
    """
    directory = Path(str(model_config.model_path))
    if adopted_stamp(model_config.hf_config) is None or not directory.is_dir():
        return
    with contextlib.suppress(SourceError):
        _remember(model_config, _read_tensors(directory))


def served_tensors(model_config: Any) -> updates.Tensors | None:
    """Return the tensors of the served checkpoint; ``None`` if it was not loaded from local files."""
    found: updates.Tensors | None = getattr(model_config, _TENSORS, None)
    return found


def note_model(model_config: Any) -> None:
    """Note that the server has this model, if it is prepared."""
    if adopted_stamp(model_config.hf_config) is not None:
        _of_server().prepared = True


def serves_prepared() -> bool:
    """Return whether a model of this process's server is prepared: the target, or a draft model."""
    return _server.prepared and _of_server().prepared


def served_by_any() -> frozenset[str]:
    """Return the names of tensors of all prepared models of this server: the target and its draft models.

    A draft model that another pipeline stage holds counts if its directory is a local one: all stages refuse the same.
    """
    server = _of_server()
    if server.of_last_stage is None:
        server.of_last_stage = _tensors_in(_draft_of_last_stage())
    return frozenset(name for tensors in (*server.tensors, server.of_last_stage) for name in tensors)


def _draft_of_last_stage() -> Path | None:
    """Return the draft model's directory, if the last pipeline stage holds that model and this is another stage."""
    from sglang.srt.runtime_context import get_parallel, get_spec

    path = get_spec().speculative_draft_model_path
    stages = int(get_parallel().pp_size)
    return Path(path) if path and stages > 1 and not get_parallel().pp_group.is_last_rank else None


def _tensors_in(directory: Path | None) -> updates.Tensors:
    """Return the tensors of a prepared checkpoint in a local directory; none of any other."""
    with contextlib.suppress(NvfpPrepError):
        if directory is not None and stamp_in(updates.read_config(directory)) is not None:
            return _read_tensors(directory)
    return {}


def _read_tensors(directory: Path) -> updates.Tensors:
    with contextlib.closing(LocalSource(directory)) as source:
        return {name: (each.dtype, each.shape) for name, each in read_index(source).tensors.items()}


def _remember(model_config: Any, found: updates.Tensors) -> updates.Tensors:
    """Return the tensors of a model's first load, which are kept."""
    if served_tensors(model_config) is None:
        setattr(model_config, _TENSORS, found)
        _of_server().tensors.append(found)
    return vars(model_config)[_TENSORS]  # type: ignore[no-any-return]


def _of_server() -> _Server:
    """Return what is known of the server whose arguments count now."""
    from sglang.srt.runtime_context import get_server_args

    global _server
    args = get_server_args()
    if _server.args is not args:
        _server = _Server(args)
    return _server
