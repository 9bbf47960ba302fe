"""A run's time series as a still picture: SVG, PNG or PDF."""

from __future__ import annotations

from pathlib import Path

from testbed.results.series_html import COLOURS
from testbed.results.series_plot import Panel, SeriesPlot

IMAGE_SUFFIXES = (".svg", ".png", ".pdf")
_WIDTH_INCHES, _PANEL_INCHES = 11.0, 2.3
_LEGEND_ROWS = 12
# A longer time is shown in ms.
_MOST_US = 5000.0
# Lines that run together must all be seen: the first are the widest.
_WIDTHS = (2.6, 2.2, 1.8, 1.4)
_WIDTH = 1.0


def save_image(plot: SeriesPlot, path: Path) -> None:
    """Draw into a file; its suffix tells the format.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH_INCHES, _PANEL_INCHES * len(plot.panels) + 0.6), layout="constrained")
    figure.suptitle(plot.title, fontsize=10)
    axes = figure.subplots(len(plot.panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, plot.panels, strict=True):
        _draw(axis, panel, plot.begin_us)
    axes[-1].set_xlim(plot.begin_us, plot.end_us)
    axes[-1].set_xlabel("emulated time (µs)")
    if plot.end_us - plot.begin_us > _MOST_US:
        axes[-1].xaxis.set_major_formatter(lambda time_us, _: f"{time_us / 1000:g}")
        axes[-1].set_xlabel("emulated time (ms)")
    figure.savefig(path, dpi=120)


def _draw(axis: object, panel: Panel, begin_us: float) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    lines = sum(not line.dashed for line in panel.lines)
    for line in panel.lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        label = None if line.dashed else line.name
        width = _WIDTHS[line.colour] if line.colour < min(len(_WIDTHS), lines - 1) else _WIDTH
        style = ("dotted", 0.8) if line.dashed else ("solid", width)
        ends_us, values = line.points(begin_us)
        axis.plot(ends_us, values, drawstyle="steps-pre", color=colour, label=label, ls=style[0], lw=style[1])
    for threshold in panel.thresholds:
        axis.axhline(threshold.value, color="#444", ls="dashed", lw=0.8)
        axis.annotate(
            threshold.name,
            (1.0, threshold.value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
        )
    for place_on_axis, bars in enumerate(panel.bars):
        spans = list(zip(bars.begin_us.tolist(), bars.length_us.tolist(), strict=True))
        axis.broken_barh(spans, (place_on_axis - 0.35, 0.7), color="#d62728", lw=0)
    if panel.bars:
        axis.set_yticks(range(len(panel.bars)), [bars.name for bars in panel.bars], fontsize=7)
        axis.invert_yaxis()
    else:
        axis.set_ylim(bottom=0)
    if any(not line.dashed for line in panel.lines):
        columns = -(-sum(not line.dashed for line in panel.lines) // _LEGEND_ROWS)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns, frameon=False)
