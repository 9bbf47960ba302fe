"""What joins the GPUs of a host, in the scenario."""

from __future__ import annotations

from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.section import Section, key

_RATE = kinds.rate(10**6, 100_000 * 10**9)
_DELAY = kinds.time(0, 10**9)


class Nvlink(Section):
    """What joins the GPUs of a host; a model, no packets."""

    # NVLink 4, of the H100: 900 GB/s, half of it each way [NVIDIA's data sheet].
    rate_bits_per_s: Annotated[int, _RATE] = key(
        "rate",
        "What a GPU sends, and what it receives, at most; NVLink's data sheets give the sum of both directions.",
        default="3600 Gbit/s",
    )
    delay_ns: Annotated[int, _DELAY] = key(
        "delay", "Latency: from a byte's leaving a GPU to its arrival at another.", default="2 us"
    )
