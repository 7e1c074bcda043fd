"""The pages show the rows of a whole run; the name sorts behind the tests that make them."""

from __future__ import annotations

import os

import pytest
from sglang_results import PAGES, TABLE, is_whole, written


@pytest.mark.parametrize("part", ["table", "servers"])
def test_the_pages_show_this_run(part: str) -> None:
    """`NVFP4_PREP_WRITE_PAGE=1 make test-sglang` writes what this compares."""
    if not is_whole():
        pytest.skip("only a part of the tests ran")
    assert {row["result"] for row in TABLE} == {"bit-equal"}  # nothing else is written
    if os.environ.get("NVFP4_PREP_WRITE_PAGE"):
        PAGES[part].write_text(written(part), encoding="utf-8")
    assert PAGES[part].read_text(encoding="utf-8") == written(part)
