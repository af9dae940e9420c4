"""One line of a self-check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What was checked and how far off it was.

    Attributes:
        name: Of the check or fixture.
        kind: Kind of fixture, or ``exactness``.
        error: Largest relative error; None if skipped.
        tolerance: Largest allowed.
        note: Why it was skipped, or where the largest error lies.
    """

    name: str
    kind: str
    error: float | None
    tolerance: float = 0.0
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.error <= self.tolerance  # NaN fails

    def strain(self) -> float:
        """How near the error comes to its tolerance: above 1 is a failure."""
        if self.failed:
            return float("inf")
        return self.error / self.tolerance if self.error else 0.0

    def __str__(self) -> str:
        head = f"{self.name:36} {self.kind:12}"
        if self.error is None:
            return f"{head} skipped: {self.note}"
        note = f"  {self.note}" if self.note else ""
        return f"{head} {self.error:9.2e} {self.tolerance:7.0e}  {'FAIL' if self.failed else 'ok'}{note}"
