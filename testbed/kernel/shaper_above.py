"""What stands above a scheduler that makes no rate itself: a token bucket filter for the port, and its delay if it has one."""

from __future__ import annotations

from testbed.kernel import tc
from testbed.kernel.delay_netem import create_netem, netem_handle
from testbed.kernel.egress import Egress
from testbed.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, RTM_NEWQDISC, Message


def create_below_shaper(egress: Egress, kind: str, options: bytes, described: str) -> list[Message]:
    """Return the shaper, the delay, and below them the scheduler, a qdisc of that kind, its options as bytes and in words."""
    index, ifname = egress.index, egress.ifname
    messages, parent = create_port_shaper(egress), tc.SHAPER_HANDLE + 1
    if egress.wall_delay_ns:
        messages.append(create_netem(index, ifname, parent, netem_handle(0), egress.wall_delay_ns))
        parent = netem_handle(0) + 1
    payload = tc.qdisc_payload(index, tc.DATA_HANDLE, parent, kind, options)
    operation = (
        f"tc qdisc replace dev {ifname} parent {tc.handle_text(parent)} handle {tc.handle_text(tc.DATA_HANDLE)} "
        f"{kind} {described}"
    )
    return [*messages, Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)]


def create_port_shaper(egress: Egress) -> list[Message]:
    """Return what creates or changes the shaper."""
    return [
        tc.create_tbf(
            egress.index,
            egress.ifname,
            tc.ROOT_HANDLE + 1,
            tc.SHAPER_HANDLE,
            rate_bytes_per_s=egress.wall_rate_bytes_per_s,
            burst_bytes=egress.burst_bytes,
            overhead_bytes=egress.overhead_bytes,
        )
    ]
