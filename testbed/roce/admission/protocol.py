"""What an admission scheme is told, and what it answers.

A scheme has two halves that meet only through grants: the receivers' (`AdmissionScheme.due`) knows what has arrived there, the
senders' (`AdmissionScheme.admitted_packets`) which grants have been received. All quantities are emulated and count from the
beginning of an iteration; arrays have a row per connection, however many queue pairs carry it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Shape ``(connections,)``."""


@dataclass(frozen=True, slots=True)
class GrantsDue:
    """What the receivers should have granted by now.

    Attributes:
        grants: Number of the latest grant of each connection; grants are numbered from 1 and stand for all before them.
        repeat: Connections whose latest grant is to be sent once more: it, or what it admitted, may have been lost.
    """

    grants: Ints
    repeat: npt.NDArray[np.bool_]


class AdmissionScheme(Protocol):
    """Both halves of the admission of all connections.

    Attributes:
        grants_needed: Whether senders wait for grants at all; if not, nothing else here matters.
    """

    grants_needed: bool

    def restart(self, now_ns: float, packets: Ints) -> None:
        """Begin an iteration in which each connection sends ``packets`` packets in all; nothing is granted yet."""

    def due(self, now_ns: float, arrived_packets: Ints) -> GrantsDue:
        """Return what the receivers should have granted, given what has arrived in order at each."""

    def admitted_packets(self, grants: Ints) -> Ints:
        """Return how many packets each sender may have sent, given the latest grant that it has received; 0 is none."""

    def granted_packets(self, connections: Ints, grants: Ints) -> tuple[Ints, Ints]:
        """Return where single grants begin in their connections' packets, and how many packets they admit."""


class SchemeModule(Protocol):
    """What a module of this package exports: a module with a ``NAME`` is found by itself.

    Attributes:
        NAME: Its name in ``transport.admission.scheme``.
        Parameters: Dataclass of its parameters, fields named with their units.
    """

    NAME: str
    Parameters: type[Any]

    def Scheme(self, parameters: Any, connections: int) -> AdmissionScheme:  # noqa: N802
        """Return both halves for that many connections."""
