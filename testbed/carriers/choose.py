"""Opens the carrier that a scenario names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from testbed.carriers.protocol import Carrier
from testbed.fabric import Fabric
from testbed.scenario import Carrier as CarrierName


def open_carrier(
    fabric: Fabric, waiting: Callable[[], None] = lambda: None, *, series: Path | None = None
) -> contextlib.AbstractContextManager[tuple[Carrier, list[str]]]:
    """Return a context manager that opens a fabric's carrier and yields it with warnings about what the machine refused.

    Args:
        fabric: The fabric; built for any workload unless the carrier is the engine.
        waiting: Called when another run has the machine; this one then waits for it.
        series: Folder for the time series of the run, which the engine alone writes; None for none.
    """
    if fabric.plan.scenario.transport.carrier is CarrierName.TCP:
        from testbed.carriers.message_loop import message_carrier
        from testbed.carriers.tcp import TcpTransport

        return message_carrier(fabric, TcpTransport, waiting)
    if fabric.plan.scenario.transport.carrier is CarrierName.RXE:
        from testbed.carriers.message_loop import message_carrier
        from testbed.carriers.rxe import RxeTransport

        return message_carrier(fabric, RxeTransport, waiting)
    from testbed.carriers.engine import engine_carrier

    return engine_carrier(fabric, waiting, series=series)


def needs_any_workload(carrier: CarrierName) -> bool:
    """Return whether a carrier's frames are not those that a fabric of the plan alone expects."""
    return carrier is not CarrierName.ENGINE
