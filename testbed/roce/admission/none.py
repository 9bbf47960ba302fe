"""No admission: a sender may always send."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from testbed.roce.admission.protocol import GrantsDue, Ints

NAME = "none"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Nothing to set."""


class Scheme:
    """Everything is admitted, nothing granted; see `protocol.AdmissionScheme`."""

    grants_needed = False

    def __init__(self, parameters: Parameters, connections: int) -> None:
        self._packets = np.zeros(connections, np.int64)

    def restart(self, now_ns: float, packets: Ints) -> None:
        """Note how much there is to send."""
        self._packets = packets.copy()

    def due(self, now_ns: float, arrived_packets: Ints) -> GrantsDue:
        """Return no grants."""
        return GrantsDue(np.zeros_like(arrived_packets), np.zeros(len(arrived_packets), bool))

    def admitted_packets(self, grants: Ints) -> Ints:
        """Return all packets."""
        return self._packets

    def granted_packets(self, connections: Ints, grants: Ints) -> tuple[Ints, Ints]:
        """Return nothing: there are no grants."""
        return np.zeros_like(grants), np.zeros_like(grants)
