"""A short fuzz run with a fixed seed; ``make fuzz`` has a long one with seeds of its own."""

from __future__ import annotations

import time

import pytest

from faults.fault_library import missing_tool
from faults.known_failures import finding_of
from faults.settings import working_folder
from fuzz.run import case_names, fuzz

pytestmark = pytest.mark.slow


def test_hostile_checkpoints() -> None:
    if (reason := missing_tool()) is not None:
        pytest.skip(reason)
    with working_folder("fuzz-") as folder:
        count, findings = fuzz(case_names("12", 50), time.monotonic() + 60, folder)
    assert count > 5, "this machine is too slow for a fuzz run"
    new = [str(finding) for finding in findings if finding_of(finding.area, str(finding)) is None]
    assert not new, f"{len(new)} findings:\n" + "\n".join(new[:40])
    if findings:
        pytest.xfail("; ".join(sorted({str(finding_of(finding.area, str(finding))) for finding in findings})))
