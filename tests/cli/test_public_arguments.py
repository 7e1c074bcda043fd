"""Every argument of every public function, and every field of every option class: a typed error, before any work."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nvfp4_prep
import nvfp4_prep.load as loading
from nvfp4_prep._util.arguments import PATH, checked
from nvfp4_prep.errors import UsageError
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.smoke import SmokeSettings

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: value for name in nvfp4_prep.__all__ if inspect.isfunction(value := getattr(nvfp4_prep, name))
} | {f"load.{name}": value for name in loading.__all__ if inspect.isfunction(value := getattr(loading, name))}
INTERNAL = ("load.handle_of", "load.make_handle")
"""Take tensors and files of a load that is under way, as servers' plugins hand them on."""
CHECKED_IN_THE_LOADER = ("layer", "tp", "ep", "device", "experts")
"""More than a kind says: see tests/load/test_arguments.py."""
COUNTS = ("threads", "memory_nbytes", "sample")
PATHS = ("source", "target", "checkpoint", "prepared", "path", "directory")
CASES = [
    (function, argument)
    for function in FUNCTIONS
    if function not in INTERNAL
    for argument in inspect.signature(FUNCTIONS[function]).parameters
    if argument not in CHECKED_IN_THE_LOADER
]
OPTIONS: tuple[type[Any], ...] = (
    nvfp4_prep.ConvertOptions,
    nvfp4_prep.ConvertRequest,
    nvfp4_prep.PublishOptions,
    nvfp4_prep.SampleModel,
    nvfp4_prep.SmokePolicy,
    SmokeSettings,
    loading.LoadOptions,
)
FIELDS = [(kind, field.name) for kind in OPTIONS for field in dataclasses.fields(kind)]


def good(folder: Path) -> dict[str, Any]:
    """Arguments that have no default, as they should be; nothing is there, so that nothing can be done."""
    return {
        "source": folder / "source",
        "target": folder / "target",
        "checkpoint": folder / "prepared",
        "prepared": folder / "prepared",
        "path": folder / "path",
        "repo_id": "a/b",
        "address": "a/b",
        "layers": "1",
        "layer": 1,
        "quiet": True,
        "request": nvfp4_prep.ConvertRequest("s", folder / "target"),
        "catalog": loading.Catalog(folder, None),  # type: ignore[arg-type]
        "share": loading.RankShare(),
        "loader": loading.ExpertLoader("cpu", loading.LoadOptions(threads=1)),
    }


def refused(function: str, folder: Path, **wrong: object) -> UsageError:
    """Call a function with one wrong argument; it says so, and leaves nothing behind."""
    call = FUNCTIONS[function]
    needed = [name for name, it in inspect.signature(call).parameters.items() if it.default is it.empty]
    arguments = good(folder)
    if function == "load.load_layers":
        arguments["layers"] = ()
    with arguments["loader"], pytest.raises(UsageError) as caught:
        call(**{name: arguments[name] for name in needed} | wrong)
    assert not list(folder.iterdir())
    return caught.value


@pytest.mark.parametrize(("function", "argument"), CASES)
def test_an_argument_of_another_type_is_named(function: str, argument: str, tmp_path: Path) -> None:
    error = refused(function, tmp_path, **{argument: object()})
    assert error.what == f"argument {argument} is wrong"
    assert error.expected and error.actual and "object object" in error.actual


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "4"], ids=repr)
@pytest.mark.parametrize(("function", "argument"), [case for case in CASES if case[1] in COUNTS])
def test_a_count_is_a_whole_number_from_1_on(function: str, argument: str, value: object, tmp_path: Path) -> None:
    error = refused(function, tmp_path, **{argument: value})
    assert error.what == f"argument {argument} is wrong" and error.actual == repr(value)


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 300, "x/" * 3000, b"x", 5], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(("function", "argument"), [case for case in CASES if case[1] in PATHS])
def test_a_path_can_be_one(function: str, argument: str, value: object, tmp_path: Path) -> None:
    assert refused(function, tmp_path, **{argument: value}).what.startswith(f"argument {argument} is wrong")


@pytest.mark.parametrize(("function", "argument"), [case for case in CASES if case[1] in PATHS])
def test_a_loop_of_links_is_refused(
    function: str, argument: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    loop = tmp_path_factory.mktemp("links") / "loop"
    loop.symlink_to(loop)
    for value in (loop, str(loop / "x")):
        assert "symbolic links" in refused(function, tmp_path, **{argument: value}).what


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_an_option_of_another_type_is_named(kind: type[Any], field: str) -> None:
    needed = {"source": "s", "target": "t"} if kind is nvfp4_prep.ConvertRequest else {}
    with pytest.raises(UsageError, match=f"option {field}") as caught:
        kind(**{**needed, field: object()})
    assert caught.value.expected and caught.value.actual


def test_texts_become_what_they_mean(tmp_path: Path) -> None:
    request = nvfp4_prep.ConvertRequest("s", str(tmp_path), report=str(tmp_path / "page"))  # type: ignore[arg-type]
    assert (request.source, request.target, request.report) == ("s", tmp_path, tmp_path / "page")
    assert nvfp4_prep.SmokePolicy(layers=[1, 2]).layers == (1, 2)  # type: ignore[arg-type]
    assert hash(nvfp4_prep.SmokePolicy(layers=[1, 2]))  # type: ignore[arg-type]


def test_every_argument_must_have_a_kind() -> None:
    with pytest.raises(TypeError, match="kinds of other arguments"):

        @checked(path=PATH)
        def function(path: Path, more: int) -> None: ...


def test_what_python_itself_refuses_stays_a_type_error() -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        nvfp4_prep.restore("a")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        nvfp4_prep.restamp("a", thread=1)  # type: ignore[call-arg]


def test_patience_is_taken() -> None:
    """An optional argument of a class passes, and what is said then is about the next one."""
    with pytest.raises(UsageError, match="argument repo_id is wrong"):
        nvfp4_prep.push("a", 5, patience=Patience())  # type: ignore[arg-type]


class Count(int):
    """A whole number of a class of its own."""


@pytest.mark.parametrize("two", [Count(2), np.int64(2), np.uint8(2)], ids=lambda value: type(value).__name__)
@pytest.mark.slow
def test_whole_numbers_of_other_classes_are_whole_numbers(two: Any, sample_source: Path, tmp_path: Path) -> None:
    options = nvfp4_prep.ConvertOptions(moe_tp=two)
    assert type(options.moe_tp) is int and options == nvfp4_prep.ConvertOptions(moe_tp=2)
    policy = nvfp4_prep.SmokePolicy(layers={two, 1}, sample=two)  # type: ignore[arg-type]
    assert policy.layers == (1, 2) and type(policy.sample) is int
    out = nvfp4_prep.convert(sample_source, tmp_path / "out", smoke=None, threads=two, memory_nbytes=10**9)
    assert nvfp4_prep.verify(out.path, threads=two).ok


class Unprintable:
    """An object whose own code fails when it is shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [10**5000, Unprintable()], ids=["many digits", "unprintable"])
def test_a_value_that_cannot_be_printed_is_refused_like_any_other(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"threads.*cannot be printed"):
        nvfp4_prep.verify(tmp_path, threads=value)


@pytest.mark.parametrize("block", ["64", 65, 17, True])
def test_the_allowed_block_sizes_are_named(block: Any) -> None:
    with pytest.raises(UsageError, match="expected 16 or 32 or 64"):
        nvfp4_prep.ConvertOptions(gate_up_block=block)
