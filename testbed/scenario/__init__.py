"""The scenario: file format, defaults, and all mistakes of a file at once."""

from testbed.scenario.application import PLACEHOLDER, ApplicationWorkload, Command, CommandMode, Figure, FigureKind
from testbed.scenario.congestion import CongestionControl
from testbed.scenario.expect import (
    FIGURE_METRIC,
    FLOW_METRIC,
    JOB_METRIC,
    Expectation,
    Verdict,
    evaluate,
    parse_expectation,
)
from testbed.scenario.fabric import ClosFabric, FabricKind, Link, StarFabric, Uplink, ZonesFabric
from testbed.scenario.faults import Fault, FaultKind
from testbed.scenario.jobs import Job, MeasuredJobs, Placement, job_host_counts, job_rounds
from testbed.scenario.load import load_scenario
from testbed.scenario.loss import LinkLoss, LostFrames
from testbed.scenario.model import Scenario
from testbed.scenario.qos import DataPriority, EcnPreset, GateChoice, MarkerChoice, SchedulerChoice, WatchdogAction
from testbed.scenario.schema import render_json_schema
from testbed.scenario.sweep import expand_sizes
from testbed.scenario.switch import Switch
from testbed.scenario.transport import (
    AdmissionScheme,
    Carrier,
    LinkDelay,
    LossRecovery,
    QpStrategy,
    Transport,
    UdpSourcePort,
)
from testbed.scenario.workload import (
    Algorithm,
    Collective,
    CollectiveWorkload,
    Flow,
    FlowsWorkload,
    IncastWorkload,
    Pattern,
    PermutationWorkload,
    RankOrder,
    Workload,
)

__all__ = [
    "FIGURE_METRIC",
    "FLOW_METRIC",
    "JOB_METRIC",
    "PLACEHOLDER",
    "AdmissionScheme",
    "Algorithm",
    "ApplicationWorkload",
    "Carrier",
    "ClosFabric",
    "Collective",
    "CollectiveWorkload",
    "Command",
    "CommandMode",
    "CongestionControl",
    "DataPriority",
    "EcnPreset",
    "Expectation",
    "FabricKind",
    "Fault",
    "FaultKind",
    "Figure",
    "FigureKind",
    "Flow",
    "FlowsWorkload",
    "GateChoice",
    "IncastWorkload",
    "Job",
    "Link",
    "LinkDelay",
    "LinkLoss",
    "LossRecovery",
    "LostFrames",
    "MarkerChoice",
    "MeasuredJobs",
    "Pattern",
    "PermutationWorkload",
    "Placement",
    "QpStrategy",
    "RankOrder",
    "Scenario",
    "SchedulerChoice",
    "StarFabric",
    "Switch",
    "Transport",
    "UdpSourcePort",
    "Uplink",
    "Verdict",
    "WatchdogAction",
    "Workload",
    "ZonesFabric",
    "evaluate",
    "expand_sizes",
    "job_host_counts",
    "job_rounds",
    "load_scenario",
    "parse_expectation",
    "render_json_schema",
]
