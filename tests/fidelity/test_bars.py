"""The bars of the project, small: 8 MiB, few seeds, judged only where the verdict is trusted."""

from __future__ import annotations

import os

import pytest

from tests.fidelity.bars import Summary, run_once
from tests.fidelity.disturbance import cpu_hogs, cpu_quota, fifo_hog, quota_folder

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

SIZE = "workload.0.size=8 MiB"
SMALL = "workload.0.size=2 MiB"
# No PFC: a collision must fit into the buffers.
ECMP = ["routing.scheme=ecmp", "fabric.switch.buffer=64 MiB", "workload.0.iters=1", "workload.0.warmup_iters=0"]
ATTEMPTS = 4


def trusted_run(*settings: str) -> Summary:
    """Return a run that this machine could be trusted with; skip as not judged when there is none in a few."""
    reasons = []
    for _ in range(ATTEMPTS):
        run = run_once([SIZE, *settings])
        assert "error" not in run, run["error"]
        if run["verdict"] == "trusted":
            return run
        reasons = run["reasons"]
    pytest.skip(f"not judged, {ATTEMPTS} runs were not trusted: {'; '.join(reasons)}")


def test_pinned_ring_takes_its_ideal_time() -> None:
    run = trusted_run()

    assert 0.995 <= run["cct_ratio"] <= 1.01
    assert run["drops_packets"] == 0
    assert run["out_of_order_packets"] == 0
    assert run["retransmitted_packets"] == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ecmp_ring_slows_down_by_the_flows_of_the_worst_link(seed: int) -> None:
    run = trusted_run(*ECMP, f"seed={seed}")

    assert run["predicted_cct_ratio"] >= 2  # a collision: the pinned bound is missed (its negative control)
    assert abs(run["cct_ratio"] / run["predicted_cct_ratio"] - 1) <= 0.03
    assert run["drops_packets"] == 0


def test_too_small_a_buffer_drops_and_go_back_n_completes() -> None:
    # A timeout of half a second here: a starved machine must not look like a dead path.
    # Three flows of 128 KiB at a time into one link leave 256 KiB behind.
    shallow = ["fabric.switch.buffer=192 KiB", "transport.retransmit_timeout=200 us", "expect=[]"]
    runs = (run_once([SMALL, *ECMP, "seed=1", *shallow]) for _ in range(ATTEMPTS))
    run = next((run for run in runs if "error" not in run), {"error": "every attempt ran out of retries"})

    assert "error" not in run, run["error"]
    assert run["drops_packets"] > 0
    assert run["retransmitted_packets"] > 0
    assert run["cct_ratio"] > run["predicted_cct_ratio"]


def _honest(run: Summary) -> None:
    if "error" not in run and abs(run["cct_ratio"] - 1) > 0.01:
        assert run["verdict"] != "trusted", run


def test_verdict_is_invalid_under_a_hog_above_the_engine() -> None:
    with fifo_hog(sorted(os.sched_getaffinity(0))[-1], 0.06, 0.04):
        run = run_once([SIZE, "workload.0.iters=1"])

    assert run["verdict"] == "invalid"
    assert run["exit_code"] == 4


@pytest.mark.skipif(quota_folder() is None, reason="no cgroup CPU controller here: a quota cannot be made")
def test_verdict_is_honest_under_a_cpu_quota() -> None:
    with cpu_quota(0.5) as group:
        run = run_once([SIZE, "workload.0.iters=1"], group)

    _honest(run)
    assert run["verdict"] == "invalid"


def test_verdict_is_honest_under_ordinary_hogs() -> None:
    with cpu_hogs(os.cpu_count() or 1):
        run = run_once([SIZE])

    _honest(run)
    if abs(run["cct_ratio"] - 1) > 0.05:
        assert run["verdict"] == "invalid", run
