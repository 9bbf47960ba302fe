"""What is to be run in a virtual machine, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class VmListener(Protocol):
    """Told what happens to the machine, not what its command says."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


@dataclass(frozen=True, slots=True)
class VmJob:
    """A command and the machine that it wants.

    Attributes:
        command: Program and arguments.
        folder: Its working directory, a path of the host.
        outputs: Folders of the host that it may write to, at the same paths; whatever else it writes is lost.
        environment: Its variables beside those that every guest has.
        virtual_time: Count instructions: a nanosecond passes with each that the guest executes, whatever the host does.
        skip_idle: In virtual time, let no time pass on the host while the guest has nothing to do. What it finds then depends
            on nothing of the host's; but time flies while it waits for a file, so that what has a deadline may miss it.
        memory_bytes: Of the guest; what the command writes outside its outputs needs some of it.
        boot_timeout_s: Wall time until the command must have begun.
        timeout_s: Wall time that the command may take; None for no limit.
    """

    command: tuple[str, ...]
    folder: Path
    outputs: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    virtual_time: bool = False
    skip_idle: bool = False
    memory_bytes: int = 2 << 30
    boot_timeout_s: float = 300.0
    timeout_s: float | None = None
