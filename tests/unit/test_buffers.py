"""Real contents: what a schedule does to them is what the collective promises, and one wrong byte is seen."""

from __future__ import annotations

import pytest

from testbed.carriers.buffers import RankBuffers
from testbed.collectives.schedule import Collective
from testbed.plan.compile import compile_plan
from testbed.scenario import load_scenario

SCENARIO = """
name: buffers
fabric: {kind: star, hosts_per_leaf: 4, host_link: {rate: 100 Gbit/s}}
transport: {carrier: tcp}
workload:
  - {collective: COLLECTIVE, size: 1000 B}
"""


def buffers_of(collective: str) -> tuple[RankBuffers, tuple[int, ...], int]:
    plan = compile_plan(load_scenario(SCENARIO.replace("COLLECTIVE", collective)), capacity_packets_per_s=None)
    planned = plan.workloads[0]
    return RankBuffers(planned.schedule, 1), planned.order, len(planned.schedule)


@pytest.mark.parametrize("collective", list(Collective))
def test_transfers_in_order_give_what_the_collective_promises(collective: Collective) -> None:
    buffers, order, transfers = buffers_of(str(collective))
    for _ in range(2):  # a second iteration begins as the first did
        buffers.restart()
        for transfer in range(transfers):  # a topological order
            buffers.deliver(transfer, buffers.source(transfer).copy())
        assert buffers.count_wrong_elements(collective, order) == 0


def test_one_wrong_byte_is_counted() -> None:
    buffers, order, transfers = buffers_of("all_reduce")
    for transfer in range(transfers):
        buffers.deliver(transfer, buffers.source(transfer).copy())
    buffers.outputs[2, 17] ^= 1
    assert buffers.count_wrong_elements(Collective.ALL_REDUCE, order) == 1


def test_transfer_that_never_came_is_seen() -> None:
    buffers, order, transfers = buffers_of("all_reduce")
    for transfer in range(transfers - 1):
        buffers.deliver(transfer, buffers.source(transfer).copy())
    assert buffers.count_wrong_elements(Collective.ALL_REDUCE, order) > 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("transport.congestion_control=dcqcn", "transport.congestion_control: must be none with carrier tcp"),
        ("transport.qp_strategy=dynamic", "transport.qp_strategy: must be split or round_robin with carrier tcp"),
        ("transport.admission.scheme=cts", "transport.admission.scheme: must be none with carrier tcp"),
        ("transport.udp_source_port=per_pair", "transport.udp_source_port: must be per_qp with carrier tcp"),
    ],
)
def test_what_only_the_engine_can_do_is_refused(setting: str, words: str) -> None:
    from testbed.errors import ScenarioError

    with pytest.raises(ScenarioError, match=words):
        load_scenario(SCENARIO.replace("COLLECTIVE", "all_reduce"), [setting])


RXE = "transport.carrier=rxe"
RXE_DCQCN = (RXE, "transport.congestion_control=dcqcn", "qos.ecn.enabled=true")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            (RXE, "transport.congestion_control=timely"),
            "must be none or dcqcn with carrier rxe, whose round trips nobody measures",
        ),
        ((*RXE_DCQCN, "qos.priorities=[{priority: 4}]"), "qos.priorities: must name no further priority"),
        ((*RXE_DCQCN, "qos.pfc.gate=plug"), "qos.pfc.gate: must be auto or tbf where dcqcn slows rxe down"),
        (
            (*RXE_DCQCN, "workload=[{application: ping, commands: [{host: 0, command: 'ping -c 1 {address:1}'}]}]"),
            "transport.congestion_control: must be none where there are applications",
        ),
    ],
)
def test_what_cannot_slow_rxe_down_is_refused(settings: tuple[str, ...], words: str) -> None:
    from testbed.errors import ScenarioError

    with pytest.raises(ScenarioError, match=words):
        load_scenario(SCENARIO.replace("COLLECTIVE", "all_reduce"), settings)


def test_dcqcn_slows_rxe_down() -> None:
    scenario = load_scenario(SCENARIO.replace("COLLECTIVE", "all_reduce"), RXE_DCQCN)
    assert scenario.transport.congestion_control == "dcqcn"
