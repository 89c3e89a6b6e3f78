"""What came of a drill."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """``problems`` is empty where all was as it should be; ``skipped`` says why a drill could not be done here."""

    drill: str
    what: str
    problems: list[str]
    skipped: str | None = None

    @property
    def word(self) -> str:
        """``ok``, ``skipped`` or ``FAILED``."""
        return "skipped" if self.skipped else "FAILED" if self.problems else "ok"
