"""The one line that a report begins with: passed, failed or inconclusive, and by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvfp4_prep._util.text import count, format_nbytes

if TYPE_CHECKING:
    from nvfp4_prep.commands.verify_report import VerifyReport
    from nvfp4_prep.smoke.report import SmokeReport

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of all checks that ran.

    Attributes:
        word: ``Passed``, ``Failed`` or ``Inconclusive``.
        sentences: what it rests on, and what was left out.
    """

    word: str
    sentences: tuple[str, ...]

    @property
    def colour(self) -> str:
        """Class of the page's first box: nothing but a pass is green."""
        return {"Passed": "good", "Failed": "bad"}.get(self.word, "soft")


def judge(verification: VerifyReport | None, smoke: SmokeReport | None) -> Verdict:
    """Return the verdict on a checkpoint: nothing wrong in any of the checks that ran, and what they were."""
    sentences = []
    failed = (verification is not None and not verification.ok) or (smoke is not None and not smoke.passed)
    if verification is not None:
        ran = [finding for finding in verification.findings if finding.problems is not None]
        good = sum(finding.passed for finding in ran)
        left_out = [finding.name for finding in verification.findings if finding.problems is None]
        sentences.append(
            f"Verification ({verification.depth}): {good} of {count(len(ran), 'check')} passed,"
            f" {count(len(verification.problems), 'problem')}, {format_nbytes(verification.checked_nbytes)} read"
            + (f"; left out: {', '.join(left_out)}." if left_out else ".")
        )
    if smoke is not None:
        sentences.append(f"Smoke test: {smoke.result}.")
    if failed:
        return Verdict("Failed", ("Do not serve this checkpoint.", *sentences))
    if smoke is not None and smoke.result == "inconclusive":
        return Verdict("Inconclusive", tuple(sentences))
    return Verdict("Passed", tuple(sentences))
