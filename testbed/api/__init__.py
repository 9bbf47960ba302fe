"""Everything that the command line does, as documented, typed calls.

::

    import testbed

    scenario = testbed.load("scenarios/ai-zone.yaml", ["routing.scheme=ecmp"])
    print(testbed.paths(scenario).predicted_cct_ratio)   # no root, nothing is built
    result = testbed.run(scenario)                       # root: builds the fabric, runs, removes it
    print(result.results[0].cct_ratio, result.fidelity.verdict)

    with testbed.deploy(scenario, name="zone"):          # stays until testbed.destroy("zone")
        pass
    testbed.execute("zone", "host0", ["ping", "-c1", "10.0.0.3"])
    testbed.run(scenario, name="zone")
    testbed.destroy("zone")

What cannot be done is a :class:`testbed.errors.TestbedError`. Imports are made where they are needed: looking at a scenario
loads neither scapy nor the engine.

By what changes together: `planning`, `outlook` and `drawing` build nothing; `runs` and `rows` run a scenario, `files` are what is
left of it; `lab` has what stays; `guest` is a virtual machine.
"""

from __future__ import annotations

from testbed.api.drawing import describe_graph, describe_result_graph, plot_series
from testbed.api.files import save_result
from testbed.api.guest import run_in_virtual_time, run_in_vm
from testbed.api.interop import check_interop
from testbed.api.lab import (
    break_lab,
    capture,
    collect_garbage,
    deploy,
    destroy,
    execute,
    find_lab,
    heal_lab,
    inject,
    inspect,
    lab_name_of,
    labs,
)
from testbed.api.listener import RunListener, SilentListener
from testbed.api.outlook import compare_paths, paths, predict
from testbed.api.planning import build_plan, find_back_ends, load, probe_machine
from testbed.api.runs import run

__all__ = [
    "RunListener",
    "SilentListener",
    "break_lab",
    "build_plan",
    "capture",
    "check_interop",
    "collect_garbage",
    "compare_paths",
    "deploy",
    "describe_graph",
    "describe_result_graph",
    "destroy",
    "execute",
    "find_back_ends",
    "find_lab",
    "heal_lab",
    "inject",
    "inspect",
    "lab_name_of",
    "labs",
    "load",
    "paths",
    "plot_series",
    "predict",
    "probe_machine",
    "run",
    "run_in_virtual_time",
    "run_in_vm",
    "save_result",
]
