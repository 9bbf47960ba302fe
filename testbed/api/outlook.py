"""What a scenario promises before it runs, and what a run made of it; nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.files import read_result
from testbed.api.planning import build_plan, plan_for_lab

if TYPE_CHECKING:
    from testbed.plan.prediction import Prediction
    from testbed.plan.report import PathComparison, PathReport
    from testbed.scenario import Scenario


def paths(scenario: Scenario, lab: str | None = None) -> PathReport:
    """Return every flow's path, the load of each link and the predicted slowdown; nothing is built.

    Args:
        scenario: Its flows.
        lab: A deployed lab of the same fabric: what is broken there is broken here.

    Raises:
        PlanError: No fabric can be planned from it.
        LabError: There is no such lab, or it was built from another fabric.
    """
    from testbed.plan.report import describe_paths

    if lab is None:
        return describe_paths(build_plan(scenario, measure=False))
    from testbed.fabric.fabric import require_same_fabric
    from testbed.kernel.registry import read_state

    plan = plan_for_lab(scenario, lab)
    require_same_fabric(plan, read_state(lab))
    return describe_paths(plan)


def compare_paths(file: Path) -> PathComparison:
    """Return what a run measured beside what its paths had promised: bytes of every link, and completion times.

    Args:
        file: Its ``result.json``, or the folder that holds it.

    Raises:
        TestbedError: The file cannot be read, or is no result.
    """
    from testbed.plan.report import PathComparison, RatioComparison, compare_links
    from testbed.units import format_size

    result, scenario = read_result(file)
    sent = {way.src: way.bytes for link in result.fabric.links for way in link.directions}
    rows = tuple(
        RatioComparison(
            f"{row.collective} ({row.algorithm}) of {format_size(row.size_bytes)}",
            row.predicted_cct_ratio,
            row.cct_ratio,
        )
        for row in result.results
    )
    return PathComparison(rows, compare_links(build_plan(scenario, measure=False), sent))


def predict(
    scenario: Scenario, *, seeds: int = 200, links_down: Sequence[str] = (), per_seed: bool = False
) -> Prediction:
    """Return the slowdown to expect over many hash seeds, by a model; nothing is built, and no limit of emulation holds.

    Args:
        scenario: The scenario.
        seeds: Number of hash seeds, from the scenario's own on.
        links_down: Links such as ``leaf0:spine1``, and switches, that are down all the time.
        per_seed: Return the ratio under each seed too.

    Raises:
        PlanError: There is no such link, or a flow has no way to its destination.
    """
    from testbed.plan.prediction import predict as predict_scenario

    return predict_scenario(scenario, seeds=seeds, links_down=links_down, per_seed=per_seed)
