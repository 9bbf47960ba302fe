"""The expected value of go-back-N's efficiency, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.loss_model import expected_slots, simulate_go_back_n

LOOP, TIMEOUT = 60, 600


@pytest.mark.parametrize("product", [0.05, 0.3, 1.0])
def test_expected_time_is_that_of_many_simulated_streams(product: float) -> None:
    loss, packets, rng = product / LOOP, 3000, np.random.default_rng(7)
    runs = [simulate_go_back_n(packets, loss, LOOP, TIMEOUT, rng) for _ in range(12)]
    rewind = sum(run.resent for run in runs) / sum(run.rewinds for run in runs)
    assert rewind == pytest.approx(LOOP, rel=0.1)
    mean = np.mean([run.slots for run in runs])
    error = np.std([run.slots for run in runs]) / np.sqrt(len(runs))
    assert abs(mean - expected_slots(packets, loss, rewind, TIMEOUT)) < 4 * error + 0.02 * mean


def test_a_short_stream_pays_for_its_last_packet() -> None:
    loss, packets, rng = 0.05, 20, np.random.default_rng(3)
    slots = [simulate_go_back_n(packets, loss, 3, 600, rng).slots for _ in range(4000)]
    assert np.mean(slots) == pytest.approx(expected_slots(packets, loss, 4, 600), rel=0.1)
    # Negative control: without the timeout's share the value is far off.
    assert np.mean(slots) > 2 * expected_slots(packets, loss, 4, 0)
