"""rdma-core's Python binding, wherever the system has it, and what every user of it does: open a device, connect a queue pair."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace
from typing import Any

from testbed.errors import MachineError
from testbed.kernel.rxe import find_gid

# Debian's packages are built for its own Python: one of the same version may use them.
_SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
_MODULES = ("addr", "cq", "device", "enums", "mr", "pd", "qp", "wr")
_RETRIES = 7
_HOP_LIMIT = 64
_PATH_MTUS = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}
MIN_RNR_TIMER = 12
"""What a requester is told to wait when there is no receive buffer: 0.64 ms."""


def import_verbs() -> SimpleNamespace:
    """Return pyverbs' modules by their names.

    Raises:
        MachineError: There is no pyverbs for this Python.
    """
    added = _SYSTEM_PACKAGES not in sys.path
    if added:
        sys.path.append(_SYSTEM_PACKAGES)
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"pyverbs.{name}") for name in _MODULES})
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MachineError(
            f"there is no pyverbs for Python {version}: {error}",
            hint="apt-get install python3-pyverbs ibverbs-providers",
        ) from None
    finally:
        if added:
            sys.path.remove(_SYSTEM_PACKAGES)


class VerbsDevice:
    """An open device with its protection domain and completion queue.

    Args:
        verbs: pyverbs' modules.
        name: Name of the device.
        address: Its interface's IPv4 address, dotted.
        completions: How many its completion queue holds.
        stack: Closes what is opened.
    """

    def __init__(self, verbs: Any, name: str, address: str, completions: int, stack: contextlib.ExitStack) -> None:
        self.name = name
        self.gid_index, gid = find_gid(name, address)
        self.gid = verbs.addr.GID(gid)
        self.context = verbs.device.Context(name=name)
        stack.callback(self.context.close)
        self.pd = verbs.pd.PD(self.context)
        stack.callback(self.pd.close)
        self.cq = verbs.cq.CQ(self.context, completions)
        stack.callback(self.cq.close)


def create_rc(verbs: Any, device: VerbsDevice, messages: int, stack: contextlib.ExitStack) -> Any:
    """Return a new reliable queue pair that holds so many messages each way."""
    qp, enums = verbs.qp, verbs.enums
    room = qp.QPCap(max_send_wr=messages, max_recv_wr=messages, max_send_sge=1, max_recv_sge=1)
    made = qp.QP(
        device.pd, qp.QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=device.cq, rcq=device.cq, cap=room, sq_sig_all=1)
    )
    stack.callback(made.close)
    return made


def connect_rc(
    verbs: Any,
    queue_pair: Any,
    device: VerbsDevice,
    *,
    remote_gid: Any,
    remote_qpn: int,
    tos: int,
    mtu_bytes: int,
    psn: int,
    ack_timeout_exponent: int,
) -> None:
    """Connect a reliable queue pair to another end, whose first PSN is the same.

    Args:
        verbs: pyverbs' modules.
        queue_pair: The queue pair, fresh.
        device: Its device.
        remote_gid: GID of the other end.
        remote_qpn: QP number of the other end.
        tos: TOS byte of what it sends.
        mtu_bytes: Payload of a full packet.
        psn: First PSN, both ways.
        ack_timeout_exponent: It waits 4.096 us times two to this for an ACK.
    """
    addr, enums = verbs.addr, verbs.enums
    route = addr.GlobalRoute(dgid=remote_gid, sgid_index=device.gid_index, hop_limit=_HOP_LIMIT, traffic_class=tos)
    attributes = verbs.qp.QPAttr(port_num=1)
    attributes.dest_qp_num = remote_qpn
    attributes.path_mtu = _PATH_MTUS[mtu_bytes]
    attributes.rq_psn = attributes.sq_psn = psn
    attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
    attributes.min_rnr_timer = MIN_RNR_TIMER
    attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = ack_timeout_exponent, _RETRIES, _RETRIES
    attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
    attributes.ah_attr = addr.AHAttr(port_num=1, is_global=1, gr=route, sl=0)
    queue_pair.to_rts(attributes)


def stop_rc(verbs: Any, queue_pair: Any) -> None:
    """Let a queue pair send no more: it fails what it has under way."""
    enums = verbs.enums
    queue_pair.modify(verbs.qp.QPAttr(qp_state=enums.IBV_QPS_ERR), enums.IBV_QP_STATE)
