"""A run's time series as a page to zoom in; it needs no network."""

from __future__ import annotations

from typing import Any

from testbed.results.series_plot import LIMIT_SUFFIX, Line, Panel, SeriesPlot

COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"),
    *("#bcbd22", "#17becf", "#393b79", "#e6550d", "#31a354", "#843c39", "#7b4173", "#637939"),
)
_PANEL_PIXELS, _MARGIN_PIXELS = 250, 130


def render_html(plot: SeriesPlot) -> str:
    """Return the page, a few megabytes for the library in it.

    Raises:
        ImportError: plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=len(plot.panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06,
        subplot_titles=[panel.title for panel in plot.panels],
    )
    for number, panel in enumerate(plot.panels, 1):
        legend = "legend" if number == 1 else f"legend{number}"
        for line in panel.lines:
            figure.add_trace(_trace(go, line, legend, panel, plot.begin_us), row=number, col=1)
        for threshold in panel.thresholds:
            label = {"text": threshold.name, "textposition": "end"}
            style = {"color": "#444", "dash": "dash", "width": 1}
            figure.add_hline(threshold.value, row=number, col=1, line=style, label=label)
        for bars in panel.bars:
            figure.add_trace(
                go.Bar(
                    base=bars.begin_us,
                    x=bars.length_us,
                    y=[bars.name] * len(bars.begin_us),
                    orientation="h",
                    marker={"color": "#d62728", "line": {"width": 0}},
                    name=bars.name,
                    showlegend=False,
                    hovertemplate="from %{base:.2f} µs for %{x:.2f} µs",
                ),
                row=number,
                col=1,
            )
        figure.update_yaxes(title_text=panel.unit, rangemode="tozero", row=number, col=1)
        top = figure.layout["yaxis" if number == 1 else f"yaxis{number}"].domain[1]
        figure.update_layout(
            {legend: {"y": top, "yanchor": "top", "x": 1.01, "font": {"size": 10}, "tracegroupgap": 0}}
        )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(range=[plot.begin_us, plot.end_us])
    figure.update_xaxes(title_text="emulated time (µs)", row=len(plot.panels), col=1)
    height = _PANEL_PIXELS * len(plot.panels) + _MARGIN_PIXELS
    figure.update_layout(
        title=plot.title, template="plotly_white", height=height, bargap=0.3, barmode="overlay", hovermode="closest"
    )
    config = {"toImageButtonOptions": {"format": "svg"}, "displaylogo": False, "responsive": True}
    page: str = figure.to_html(include_plotlyjs=True, config=config)
    return page.replace("<head>", f"<head><title>{plot.title}</title>", 1)


def _trace(go: Any, line: Line, legend: str, panel: Panel, begin_us: float) -> Any:
    ends_us, values = line.points(begin_us)
    return go.Scatter(
        x=ends_us,
        y=values,
        name=line.name,
        mode="lines",
        legend=legend,
        showlegend=not line.dashed,
        legendgroup=line.name.removesuffix(LIMIT_SUFFIX),
        line={
            "shape": "vh",
            "width": 1 if line.dashed else 1.5,
            "color": COLOURS[line.colour % len(COLOURS)],
            "dash": "dot" if line.dashed else "solid",
        },
        hovertemplate=f"%{{y:.4g}} {panel.unit} at %{{x:.2f}} µs",
    )
