"""Traffic engineering against E-ECMP when uplinks fail: what each comes to, before and after the controller reacts.

::

    .venv/bin/python -m benchmarks.failures --seeds 100
    .venv/bin/python -m benchmarks.failures --seeds 0 --emulate 1 --workload permutation   # root: run as well

Predictions need no root. The fabric is 4 racks of 4 NICs on 4 spines, all links alike; each seed has a permutation of its own.
m is the completion time over that of a core that never blocks. "te, before" is what stands between the failure and the
controller's reaction: entries that lead nowhere are withdrawn, and their flows hashed over the ways that are left.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from testbed.plan.compile import compile_plan
from testbed.plan.flows import trace_connection_routes
from testbed.plan.model import Plan
from testbed.plan.predict import predict_cct_ratio
from testbed.scenario import Carrier, load_scenario

SCENARIO = """
name: failures
fabric:
  {kind: clos, leaves: 4, spines: 4, hosts_per_leaf: 4, host_link: {rate: 400 Gbit/s, delay: 600 ns}, switch: {buffer: 64 MiB}}
routing: {detection_time: 0 ns, convergence_time: 0 ns, te_loop_time: 1 s}
workload: [{pattern: permutation, size: 8 MiB}]
time_dilation: 4000
"""
WORKLOADS = {
    "permutation": "{pattern: permutation, size: 8 MiB, iters: 1, warmup_iters: 0}",
    "ring all-reduce, every hop over the spines": (
        "{collective: all_reduce, algorithm: ring, order: rails, size: 8 MiB, iters: 1, warmup_iters: 0}"
    ),
}
SCHEMES = {
    "te, before": ("te", 1, "1 ns"),
    "te, after": ("te", 1, "0 ns"),
    "e-ecmp, 16 QPs": ("e-ecmp", 16, "0 ns"),
}


@dataclass(frozen=True)
class Case:
    """Which links are down."""

    name: str
    links: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Yield k uplinks of one leaf down, then one uplink on each of k leaves, each time another spine's."""
    yield Case("none", ())
    for count in (1, 2, 3):
        yield Case(f"{count} of leaf0", tuple(f"leaf0:spine{spine}" for spine in range(count)))
    for count in (2, 3, 4):
        yield Case(f"1 of each of {count} leaves", tuple(f"leaf{leaf}:spine{leaf}" for leaf in range(count)))


def overrides_of(workload: str, case: Case, label: str, seed: int) -> list[str]:
    """Return what makes the scenario that case of that workload under that scheme."""
    scheme, qps, at = SCHEMES[label]
    faults = ", ".join(f'{{at: {at}, link_down: "{link}"}}' for link in case.links)
    return [
        f"workload[0]={WORKLOADS[workload]}",
        f"routing.scheme={scheme}",
        f"transport.qps_per_connection={qps}",
        f"faults=[{faults}]",
        f"seed={seed}",
    ]


def predict(workload: str, case: Case, label: str, seed: int) -> float:
    """Return the predicted m of one seed, once the switches have reacted."""
    plan = compile_plan(load_scenario(SCENARIO, overrides_of(workload, case, label, seed)), capacity_packets_per_s=None)
    return predict_reacted(plan)


def predict_reacted(plan: Plan) -> float:
    """Return m by the tables that the first moments of an iteration leave behind."""
    (planned,) = plan.workloads
    reacted = [step.tables for step in plan.faults.steps if step.at_ns <= 1][-1]
    if reacted is plan.tables:
        return planned.predicted_cct_ratio
    assert planned.qps_per_connection == 1
    routes = [trace_connection_routes(one, plan.topology, reacted, Carrier.ENGINE) for one in planned.connections]
    return predict_cct_ratio(plan.topology, planned.schedule, routes)


def emulate(workload: str, case: Case, label: str, seed: int) -> tuple[float, str]:
    """Return the measured m of one seed, and the verdict on this machine. Needs root."""
    from testbed import api

    result = api.run(load_scenario(SCENARIO, overrides_of(workload, case, label, seed)))
    ratio = result.results[0].cct_ratio
    assert ratio is not None
    assert result.fidelity is not None
    return ratio, str(result.fidelity.verdict)


def render(workload: str, seeds: Sequence[int]) -> str:
    """Return a workload's table, and where the schemes cross."""
    lines = [
        f"**{workload}**",
        "",
        "| uplinks down | te, before | te, after | e-ecmp, 16 QPs | best |",
        "| --- | --- | --- | --- | --- |",
    ]
    means: dict[tuple[str, str], float] = {}
    for case in cases():
        cells = []
        for label in SCHEMES:
            found = [predict(workload, case, label, seed) for seed in seeds]
            means[case.name, label] = statistics.fmean(found)
            cells.append(
                f"{statistics.fmean(found):.2f} ({np.percentile(found, 5):.2f}-{np.percentile(found, 95):.2f})"
            )
        best = min(SCHEMES, key=lambda label: means[case.name, label])
        lines.append(f"| {case.name} | {' | '.join(cells)} | {best} |")
    lines += ["", f"Mean predicted m over {len(seeds)} seeds (5th to 95th percentile)."]
    for label in ("te, before", "te, after"):
        worse = [case.name for case in cases() if means[case.name, label] > means[case.name, "e-ecmp, 16 QPs"]]
        lines.append(f"{label} is worse than e-ecmp with: {', '.join(worse) or 'none of these'}.")
    return "\n".join(lines) + "\n"


def compare(workload: str, seeds: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a table of predicted and emulated figures, as they come. Needs root."""
    yield "| uplinks down | scheme | seed | predicted m | emulated m | difference |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for case in cases():
        for label in SCHEMES:
            for seed in seeds:
                expected, (measured, verdict) = (
                    predict(workload, case, label, seed),
                    emulate(workload, case, label, seed),
                )
                figures = f"{expected:.3f} | {measured:.3f} | {measured / expected - 1:+.1%}"
                yield f"| {case.name} | {label} | {seed} | {figures}{'' if verdict == 'trusted' else f' ({verdict})'} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=40, help="seeds that are predicted; 0: none")
    parser.add_argument("--emulate", type=int, default=0, metavar="SEEDS", help="seeds that are run as well")
    parser.add_argument("--workload", choices=WORKLOADS, help="one of them; else all")
    options = parser.parse_args()
    for workload in WORKLOADS if options.workload is None else [options.workload]:
        print(render(workload, range(1, options.seeds + 1)) if options.seeds else f"**{workload}**\n", flush=True)
        for line in compare(workload, range(1, options.emulate + 1)) if options.emulate else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
