"""``testbed plot``: the time series of a run as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# Suffixes of the files that can be written; a test compares them with what draws.
SUFFIXES = (".html", ".svg", ".png", ".pdf")


def plot(
    folder: Annotated[Path, typer.Argument(metavar="RESULTS_DIR", help="Results folder of a run.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="|".join(f"FILE{suffix}" for suffix in SUFFIXES),
            envvar="TESTBED_PLOT_OUTPUT",
            help="File to write. [default: RESULTS_DIR/plot.html]",
            show_default=False,
        ),
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(
            "--row",
            min=0,
            envvar="TESTBED_PLOT_ROW",
            help="Row of the results table, from 0. [default: the last that was run]",
            show_default=False,
        ),
    ] = None,
    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration",
            min=0,
            envvar="TESTBED_PLOT_ITERATION",
            help="A single measured iteration, from 0. [default: all]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw queue depths, rates of flows, pauses, marks and CNPs over time; also of a run that was interrupted.

    HTML can be zoomed and needs no network. Warm-ups are drawn only where nothing else was measured.
    """
    from testbed import api

    target = output or folder / "plot.html"
    if target.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"-o must end in {', '.join(SUFFIXES)}, got {target.name!r}")
    api.plot_series(folder, target, row=row, iteration=iteration)
    print(f"plot: {target}", file=sys.stderr)
