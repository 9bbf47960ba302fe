"""The load that capacity is measured with: every host sends to one under another leaf, over pinned paths that do not collide."""

from __future__ import annotations

from testbed.plan.compile import compile_plan
from testbed.plan.model import Plan
from testbed.scenario import load_scenario

FRAME_BITS = 4178 * 8  # on the wire: 4096 + 58 + 24 bytes
RATE_BITS_PER_S = 400_000_000_000
PAYLOAD_BYTES = 4096


class Quiet:
    """A listener that says nothing."""

    def iteration(self, number: int, of: int, *, warmup: bool) -> None:
        """Say nothing."""


def clos_text(leaves: int, spines: int, hosts_per_leaf: int) -> str:
    """Return the fabric and routing sections of a scenario."""
    return (
        "name: benchmark\n"
        f"fabric: {{kind: clos, leaves: {leaves}, spines: {spines}, hosts_per_leaf: {hosts_per_leaf}, "
        "host_link: {rate: 400 Gbit/s, delay: 600 ns}, switch: {buffer: 64 MiB}}\n"
        "routing: {scheme: pinning}\n"
    )


def load_plan(
    packets_per_s: float, packets: list[float], leaves: int = 4, spines: int = 4, hosts_per_leaf: int = 4
) -> Plan:
    """Return the plan of a load.

    Args:
        packets_per_s: Of all hosts together, on this machine's clock.
        packets: Packets of each workload item, all hosts together.
        leaves: Leaves of the fabric.
        spines: Its spines.
        hosts_per_leaf: Hosts under each leaf.
    """
    hosts = leaves * hosts_per_leaf
    sizes = [max(1, round(count / hosts)) * PAYLOAD_BYTES for count in packets]
    items = [f"- {{collective: send_recv, order: rails, size: {size}, iters: 1, warmup_iters: 0}}" for size in sizes]
    text = clos_text(leaves, spines, hosts_per_leaf) + "workload:\n" + "\n".join(items) + "\n"
    dilation = hosts * RATE_BITS_PER_S / FRAME_BITS / packets_per_s
    return compile_plan(load_scenario(text, [f"time_dilation={dilation:.3f}"]), capacity_packets_per_s=None)
