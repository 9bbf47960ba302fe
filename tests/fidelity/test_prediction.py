"""The ratio that a hash seed comes to in the emulation is what `predict` says for that seed, and not what it says for others."""

from __future__ import annotations

from pathlib import Path

import pytest

import testbed
from tests.fidelity.bars import follows_its_own_seed
from tests.fidelity.runs import trusted_run

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

E_ECMP = Path(__file__).parents[2] / "scenarios/routing/e-ecmp.yaml"
# At this dilation what shared ports gain by full buckets is small beside an iteration of this size.
SHORT = ("workload[0].size=8MiB", "workload[0].warmup_iters=0", "time_dilation=4000")


@pytest.mark.parametrize(
    ("qps", "seeds"),
    [
        (4, (5, 6)),  # test_bars.py has one queue pair
        pytest.param(1, range(1, 11), marks=pytest.mark.slow),
        pytest.param(4, range(1, 11), marks=pytest.mark.slow),
    ],
    ids=["4 QPs", "1 QP, ten seeds", "4 QPs, ten seeds"],
)
def test_a_run_takes_as_long_as_predicted_for_its_own_hash_seed(qps: int, seeds: tuple[int, ...] | range) -> None:
    settings = (*SHORT, f"transport.qps_per_connection={qps}")
    found = testbed.predict(testbed.load(E_ECMP, settings), seeds=max(seeds), per_seed=True).ratios.cct_ratios
    assert found is not None
    measured = [trusted_run(E_ECMP, *settings, f"routing.hash_seed={seed}").results[0].cct_ratio for seed in seeds]

    assert follows_its_own_seed(measured, [found[seed - 1] for seed in seeds])  # type: ignore[arg-type]


@pytest.mark.slow
def test_queue_pairs_without_entropy_of_their_own_gain_nothing() -> None:
    # The negative control of QP scaling: 16 queue pairs whose five-tuple is one, beside a single one.
    small = (*SHORT, "transport.udp_source_port=per_pair")
    scheme = {"control": "ecmp", "entropy": "e-ecmp"}
    single, control, entropy = (
        trusted_run(E_ECMP, *small, f"routing.scheme={scheme[which]}", f"transport.qps_per_connection={qps}")
        .results[0]
        .cct_ratio
        for which, qps in (("control", 1), ("control", 16), ("entropy", 16))
    )
    assert single is not None
    assert control is not None
    assert entropy is not None
    assert 0.9 <= control / single <= 1.1
    assert entropy / single < 0.8  # what they gain with it
