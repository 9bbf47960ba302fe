"""What a run found out: the result as a value, its JSON and its table."""

from __future__ import annotations

from testbed.results.model import (
    SCHEMA_VERSION,
    ApplicationResult,
    Check,
    CollectiveResult,
    CommandResult,
    FabricCounts,
    FabricResult,
    FaultResult,
    Fidelity,
    FidelityVerdict,
    FigureResult,
    FlowResult,
    LinkDirection,
    LinkResult,
    Result,
    render_json,
)
from testbed.results.table import render_applications, render_table

__all__ = [
    "SCHEMA_VERSION",
    "ApplicationResult",
    "Check",
    "CollectiveResult",
    "CommandResult",
    "FabricCounts",
    "FabricResult",
    "FaultResult",
    "Fidelity",
    "FidelityVerdict",
    "FigureResult",
    "FlowResult",
    "LinkDirection",
    "LinkResult",
    "Result",
    "render_applications",
    "render_json",
    "render_table",
]
