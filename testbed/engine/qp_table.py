"""The fabric's QP table as the engine writes and reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from testbed.engine.setup import EngineSetup
from testbed.roce.queue_pairs import REQUESTER, RESPONDER, qp_index


def write_qp_table(qps: npt.NDArray[Any], setup: EngineSetup) -> None:
    """Write the QP table; a QP is made active last."""
    qps["active"] = 0
    for name in qps.dtype.names or ():
        if name != "active":
            qps[name] = 0
    for index, connection in enumerate(setup.connections):
        for role, end in ((REQUESTER, connection.requester), (RESPONDER, connection.responder)):
            row = qps[qp_index(index, role)]
            row["peer_qpn"] = end.peer_qpn
            row["port"] = setup.nic_port[end.local.nic]
            row["udp_source_port"] = end.udp_source_port
            row["initial_rx_psn"] = connection.initial_psn
            row["initial_tx_psn"] = connection.initial_psn
            row["cnp_interval_ns"] = setup.wall_cnp_interval_ns
            row["selective"] = setup.selective
    roles = [REQUESTER, RESPONDER] if setup.foreign is None else [REQUESTER]
    for role in roles:
        qps["active"][qp_index(0, role) : 2 * len(setup.connections) : 2] = 1


def adjacent_fields(rows: npt.NDArray[Any], first: str, count: int) -> npt.NDArray[np.int64]:
    """Return ``count`` neighbouring 64-bit fields of structured rows as a view, shape ``(count, rows)``."""
    column = rows[first].view(np.int64)
    return np.lib.stride_tricks.as_strided(column, (count, len(rows)), (8, column.strides[0]))
