"""The actor through which a sweep's trials tell the command their progress, and the command asks them to end."""

from typing import Any


class TrialMonitor:
    """The actor itself; its handle travels to the trials."""

    def __init__(self) -> None:
        self._news: dict[int, dict[str, Any]] = {}
        self._ending: set[int] = set()
        self._all_end = False

    def report(self, number: int, news: dict[str, Any]) -> bool:
        """Take a trial's newest numbers; answers whether it should end."""
        self._news[number] = self._news.get(number, {}) | news
        return self._all_end or number in self._ending

    def reports(self) -> dict[int, dict[str, Any]]:
        """Return what every trial has told."""
        return self._news

    def end(self, number: int) -> None:
        """Ask a trial to save a checkpoint and end."""
        self._ending.add(number)

    def end_all(self) -> None:
        """Ask all trials to save a checkpoint and end, those too that have not begun."""
        self._all_end = True
