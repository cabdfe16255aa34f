"""When to say again what happens on many calls: a file of its own, because hop, usage and runtime all need it and it
belongs to none of them."""

from __future__ import annotations

from typing import Final

SELDOM_S: Final = 60.0  # between two lines about the same thing that happens again and again
SUBJECTS_MAX: Final = 100  # things that are told apart; with more of them all begin anew


class Seldom:
    """When a line is due about something that happens on many calls: the first time, then at most once a minute."""

    def __init__(self, every_s: float = SELDOM_S) -> None:
        self._every_s = every_s
        self._subjects: dict[str, tuple[float, int]] = {}  # when the next line is due, and how often since the last

    def due(self, subject: str, now_s: float) -> int | None:
        """How often it happened since the last line, this time included; None: no line now."""
        due_s, count = self._subjects.get(subject, (now_s, 0))
        count += 1
        if now_s < due_s:
            self._subjects[subject] = (due_s, count)
            return None
        if len(self._subjects) >= SUBJECTS_MAX:
            self._subjects.clear()
        self._subjects[subject] = (now_s + self._every_s, 0)
        return count
