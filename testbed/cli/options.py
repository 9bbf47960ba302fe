"""Options that several commands share, and how they read the environment."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SET_VARIABLE = "TESTBED_SET"
_SET_SEPARATOR = ";"


class OutputFormat(StrEnum):
    """What goes to stdout."""

    TABLE = "table"
    JSON = "json"


ScenarioFile = Annotated[Path, typer.Argument(metavar="FILE", help="Scenario, a YAML file.", show_default=False)]
Format = Annotated[OutputFormat, typer.Option("--format", envvar="TESTBED_FORMAT", help="What to print on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Change a key of the scenario, such as fabric.spines=8; may be repeated. [env var: {SET_VARIABLE}, "
        f"changes separated by '{_SET_SEPARATOR}']",
        show_default=False,
    ),
]
LabName = Annotated[
    str | None,
    typer.Option("--name", metavar="LAB", envvar="TESTBED_NAME", help="Name of the lab.", show_default=False),
]
PcapPorts = Annotated[
    list[str] | None,
    typer.Option(
        "--pcap-port",
        metavar="NODE[/IFNAME]",
        envvar="TESTBED_PCAP_PORT",
        help="Where --pcap captures: a node or a port such as leaf0/up1; may be repeated. [default: all NICs of hosts]",
        show_default=False,
    ),
]
SnapLength = Annotated[
    int | None,
    typer.Option(
        "--snap-length",
        metavar="BYTES",
        min=0,
        max=65535,
        envvar="TESTBED_SNAP_LENGTH",
        help="Bytes captured of each frame; 0 for all, ICRC included. [default: 128, all headers]",
        show_default=False,
    ),
]


def read_overrides(given: list[str] | None) -> list[str]:
    """Return the changes to the scenario: those of the environment, then those of the command line.

    typer would split the variable at blanks, which values such as ``64 MiB`` contain.
    """
    variable = os.environ.get(SET_VARIABLE, "")
    return [part.strip() for part in variable.split(_SET_SEPARATOR) if part.strip()] + (given or [])
