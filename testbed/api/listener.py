"""Who is told what a call is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class RunListener(Protocol):
    """Told what a run is doing; must be quick, for it is called in the engine's process."""

    def note(self, text: str) -> None:
        """Something worth a line began."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """An iteration begins, ``number`` counting from 0."""


class SilentListener:
    """Hears everything, says nothing."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Ignore it."""
