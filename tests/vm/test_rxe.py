"""The carrier `rxe`: the kernel's own RoCE computes real sums over the same fabric."""

from __future__ import annotations

import pytest

from tests.vm.test_run import run_scenario

pytestmark = pytest.mark.root

SIZE_BYTES = 1 << 20
ITERATIONS = 2


def test_all_reduce_over_rxe_is_right_and_near_its_ideal() -> None:
    result = run_scenario("rxe.yaml", size="1 MiB", iters=ITERATIONS)
    row = result["results"][0]
    assert row["wrong_elements"] == 0
    assert row["cct_ratio"] <= 1.15
    # Every hop of the ring crosses a spine: 2 (n - 1) / n of the buffer for each of the four ranks, in packets of 4 KiB.
    spines = [way for link in result["fabric"]["links"] for way in link["directions"] if way["src"].startswith("spine")]
    payload = ITERATIONS * 4 * SIZE_BYTES * 6 // 4
    assert payload <= sum(way["bytes"] for way in spines) <= 1.05 * payload
    assert sum(way["packets"] for way in spines) >= payload // 4096


@pytest.mark.parametrize("seed", [1, 2])
def test_collisions_cost_what_the_ways_that_were_taken_predict(seed: int) -> None:
    result = run_scenario(
        "rxe.yaml", "routing.scheme=ecmp", f"routing.hash_seed={seed}", "transport.qps_per_connection=2", "expect=[]",
        size="1 MiB",
    )  # fmt: skip
    row = result["results"][0]
    assert row["wrong_elements"] == 0
    assert row["cct_ratio"] == pytest.approx(row["predicted_cct_ratio"], rel=0.15)
