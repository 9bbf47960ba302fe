"""The ratio that a hash seed comes to in the emulation is what `predict` says for that seed, and not what it says for others."""

from __future__ import annotations

from pathlib import Path

import pytest

import testbed
from tests.fidelity.bars import follows_its_own_seed
from tests.fidelity.runs import trusted_run

pytestmark = [pytest.mark.root, pytest.mark.fidelity]

E_ECMP = Path(__file__).parents[2] / "scenarios/routing/e-ecmp.yaml"


@pytest.mark.parametrize(
    ("qps", "seeds"),
    [
        (1, (1, 2)),
        (4, (5, 6)),
        pytest.param(1, range(1, 11), marks=pytest.mark.slow),
        pytest.param(4, range(1, 11), marks=pytest.mark.slow),
    ],
    ids=["1 QP", "4 QPs", "1 QP, ten seeds", "4 QPs, ten seeds"],
)
def test_a_run_takes_as_long_as_predicted_for_its_own_hash_seed(qps: int, seeds: tuple[int, ...] | range) -> None:
    settings = ("workload[0].size=8MiB", "workload[0].warmup_iters=0", f"transport.qps_per_connection={qps}")
    found = testbed.predict(testbed.load(E_ECMP, settings), seeds=max(seeds), per_seed=True).ratios.cct_ratios
    assert found is not None
    measured = [trusted_run(E_ECMP, *settings, f"routing.hash_seed={seed}").results[0].cct_ratio for seed in seeds]

    assert follows_its_own_seed(measured, [found[seed - 1] for seed in seeds])  # type: ignore[arg-type]
