"""The page shows the rows of a whole run; the name sorts behind the tests that make them."""

from __future__ import annotations

import os

import pytest
from sglang_results import PAGE, TABLE, is_whole, written


def test_the_page_shows_this_run() -> None:
    """`NVFP4_PREP_WRITE_PAGE=1 make test-sglang` writes what this compares."""
    if not is_whole():
        pytest.skip("only a part of the tests ran")
    assert {row["result"] for row in TABLE} == {"bit-equal"}  # nothing else is written
    page = PAGE.read_text(encoding="utf-8")
    if os.environ.get("NVFP4_PREP_WRITE_PAGE"):
        PAGE.write_text(written(page), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written(page)
