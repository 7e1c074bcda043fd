"""The package's public names: the same for the program and for type checkers."""

from __future__ import annotations

import ast

import pytest

import nvfp4_prep
from support.paths import ROOT


def test_type_checkers_see_every_public_name() -> None:
    """A name that is missing under TYPE_CHECKING is Any to them, because of the module's __getattr__."""
    tree = ast.parse((ROOT / "converter" / "nvfp4_prep" / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for node in guarded.body for alias in getattr(node, "names", [])}
    assert seen | {"__version__"} == set(nvfp4_prep.__all__)


@pytest.mark.parametrize("name", nvfp4_prep.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(nvfp4_prep, name) is not None
