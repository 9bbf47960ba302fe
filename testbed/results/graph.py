"""A fabric as a picture: what is drawn, and its text for mermaid and graphviz. `graph_svg` draws it without either.

With the figures of a run, links show heat: colour and width say how busy each direction was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from testbed.results.model import LinkDirection
from testbed.units import format_rate, format_size, format_time

TIERS = ("superspine", "spine", "leaf", "host")
"""Kinds of nodes from the top down."""

NODE_FILLS: Mapping[str, str] = {"superspine": "#f2e3ee", "spine": "#e6e2f4", "leaf": "#dce9f6", "host": "#f1f3f5"}
NODE_STROKES: Mapping[str, str] = {"superspine": "#9c4f86", "spine": "#6f60ad", "leaf": "#4679ad", "host": "#7d8894"}
LINK_COLOUR = "#8792a0"


@dataclass(frozen=True, slots=True)
class HeatStep:
    """A step of the scale of utilisation: up to ``limit_fraction``, this colour."""

    limit_fraction: float
    colour: str
    label: str


# Told apart in grey and by the colour-blind: light to dark, blue to red by way of amber.
HEAT_SCALE = (
    HeatStep(0.001, "#c4ccd4", "idle"),
    HeatStep(0.25, "#86b8dc", "to 25 %"),
    HeatStep(0.50, "#3c83bd", "to 50 %"),
    HeatStep(0.75, "#f0ae34", "to 75 %"),
    HeatStep(0.90, "#e0662a", "to 90 %"),
    HeatStep(float("inf"), "#a3172a", "above"),
)
_MIN_WIDTH, _MORE_WIDTH = 1.2, 4.8


class GraphFormat(StrEnum):
    """How a fabric is drawn."""

    MERMAID = "mermaid"
    DOT = "dot"
    SVG = "svg"


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A node.

    Attributes:
        name: Such as ``leaf0``.
        kind: One of `TIERS`.
        ports: Names of its interfaces.
    """

    name: str
    kind: str
    ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GraphLink:
    """A link from its lower end ``a`` to its upper end ``b``.

    Attributes:
        a: Name of the lower node.
        b: Name of the upper node.
        rate_bits_per_s: Its rate.
        delay_ns: Its delay.
        up: What ``a`` sends: its ports, and after a run its figures.
        down: What ``b`` sends.
    """

    a: str
    b: str
    rate_bits_per_s: int
    delay_ns: int
    up: LinkDirection
    down: LinkDirection

    def describe_kind(self) -> str:
        """Return rate and delay as text."""
        return f"{format_rate(self.rate_bits_per_s)}, {format_time(self.delay_ns)}"


@dataclass(frozen=True, slots=True)
class Graph:
    """A fabric to be drawn.

    Attributes:
        name: Its heading.
        nodes: Its nodes; in a tier they are drawn in this order where links leave the choice.
        links: Its links.
        measured: Whether the links carry the figures of a run.
    """

    name: str
    nodes: tuple[GraphNode, ...]
    links: tuple[GraphLink, ...]
    measured: bool = False

    def tiers(self) -> list[tuple[str, list[GraphNode]]]:
        """Return the nodes by kind, from the top down; kinds that are not known come first."""
        unknown = sorted({node.kind for node in self.nodes} - set(TIERS))
        found = [(kind, [node for node in self.nodes if node.kind == kind]) for kind in (*unknown, *TIERS)]
        return [(kind, nodes) for kind, nodes in found if nodes]

    def directions(self) -> list[LinkDirection]:
        """Return both directions of every link."""
        return [way for link in self.links for way in (link.up, link.down)]

    def describe_size(self) -> str:
        """Return how much of what there is, such as ``2 spines, 4 leaves, 8 hosts, 16 links``."""
        parts = [_count(len(nodes), kind) for kind, nodes in self.tiers()]
        return ", ".join([*parts, _count(len(self.links), "link")])


def _count(number: int, what: str) -> str:
    plural = "leaves" if what == "leaf" else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def heat_of(way: LinkDirection) -> HeatStep:
    """Return the step of the scale for a direction; one that was not measured counts as idle."""
    used = way.utilisation_fraction or 0.0
    return next(step for step in HEAT_SCALE if used <= step.limit_fraction)


def width_of(way: LinkDirection) -> float:
    """Return how wide a direction is drawn."""
    return round(_MIN_WIDTH + _MORE_WIDTH * min(1.0, way.utilisation_fraction or 0.0), 2)


def hottest(directions: Sequence[LinkDirection]) -> LinkDirection:
    """Return the busiest direction, the first of equals."""
    return max(directions, key=lambda way: way.utilisation_fraction or 0.0)


def describe_direction(way: LinkDirection) -> str:
    """Return a direction and its figures on one line."""
    parts = []
    if way.utilisation_fraction is not None:
        parts.append(format_percent(way.utilisation_fraction))
    if way.packets is not None:
        parts.append(f"{way.packets} packets")
    if way.peak_depth_bytes is not None:
        parts.append(f"peak queue {format_depth(way.peak_depth_bytes)}")
    if way.drops_packets:
        parts.append(f"{way.drops_packets} drops")
    return f"{way.src} > {way.dst}" + (f": {', '.join(parts)}" if parts else "")


def format_percent(fraction: float) -> str:
    """Return a fraction as per cent, such as ``97.1 %``."""
    return f"{100 * fraction:.1f} %"


def format_depth(nbytes: int) -> str:
    """Return a queue's depth, rounded to three digits."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return format_size(nbytes)


def render_mermaid(graph: Graph) -> str:
    """Return the graph as a mermaid flowchart; a link shows the busier of its directions, its label both."""
    lines = [
        "---",
        f"title: {_quoted(graph.name)}",
        "---",
        "flowchart TB",
    ]
    for kind, nodes in graph.tiers():
        lines += [f'  {_mermaid_id(node.name)}["{node.name}"]:::{kind}' for node in nodes]
    styles = []
    for index, link in enumerate(graph.links):
        # From the top down: mermaid puts the source of an edge above its target.
        ends = _mermaid_id(link.b), _mermaid_id(link.a)
        if graph.measured:
            way = hottest((link.up, link.down))
            shares = [format_percent(one.utilisation_fraction or 0.0) for one in (link.down, link.up)]
            lines.append(f'  {ends[0]} ---|"↓ {shares[0]}<br/>↑ {shares[1]}"| {ends[1]}')
            styles.append(f"  linkStyle {index} stroke:{heat_of(way).colour},stroke-width:{width_of(way):g}px")
        else:
            lines.append(f'  {ends[0]} ---|"{format_rate(link.rate_bits_per_s)}"| {ends[1]}')
    lines += styles
    for kind, _ in graph.tiers():
        fill, stroke = NODE_FILLS.get(kind, "#ffffff"), NODE_STROKES.get(kind, "#000000")
        lines.append(f"  classDef {kind} fill:{fill},stroke:{stroke},color:#1d2733")
    return "".join(f"{line}\n" for line in lines)


def render_dot(graph: Graph) -> str:
    """Return the graph for graphviz; after a run, the half of a link at each end shows what that end sends."""
    lines = [
        f"graph {_quoted(graph.name)} {{",
        "  graph [rankdir=TB, ranksep=1.6, nodesep=0.3, splines=line]",
        f'  graph [label={_quoted(graph.name)}, labelloc=t, fontname="sans-serif"]',
        '  node [shape=box, style="filled,rounded", fontname="sans-serif", fontsize=11, height=0.35]',
        '  edge [fontname="sans-serif", fontsize=9]',
    ]
    for kind, nodes in graph.tiers():
        lines.append(f"  {{ rank=same  // {kind}")
        fill, stroke = NODE_FILLS.get(kind, "#ffffff"), NODE_STROKES.get(kind, "#000000")
        lines += [f'    {_quoted(node.name)} [fillcolor="{fill}", color="{stroke}"]' for node in nodes]
        lines.append("  }")
    for link in graph.links:
        ends = f"{_quoted(link.b)} -- {_quoted(link.a)}"
        tooltip = "\\n".join(describe_direction(way) for way in (link.up, link.down))
        attributes = {
            "tooltip": f'"{link.describe_kind()}\\n{tooltip}"',
            "color": f'"{LINK_COLOUR}"',
        }
        if graph.measured:
            way = hottest((link.up, link.down))
            attributes["color"] = f'"{heat_of(link.down).colour};0.5:{heat_of(link.up).colour}"'
            attributes["penwidth"] = f"{width_of(way):g}"
        lines.append(f"  {ends} [{', '.join(f'{key}={value}' for key, value in attributes.items())}]")
    lines.append("}")
    return "".join(f"{line}\n" for line in lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _mermaid_id(name: str) -> str:
    """Return a node's name as an identifier; ``end`` and the like are words of the language."""
    return f"n_{name}".replace("-", "_")
