"""Draws a fabric as SVG: tiers from the spines down to the hosts, hosts under their leaf, no program needed.

After a run each half of a link shows what the node at that end sends, as network weather maps do: colour and width are
utilisation, a disc at the sending end is the greatest depth of its queue.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from testbed.results.graph import (
    HEAT_SCALE,
    LINK_COLOUR,
    NODE_FILLS,
    NODE_STROKES,
    Graph,
    GraphLink,
    GraphNode,
    describe_direction,
    format_depth,
    format_percent,
    heat_of,
    hottest,
    width_of,
)
from testbed.results.model import LinkDirection

# All lengths are in px.
_FONT, _CHARACTER = 12, 7.3
_MARGIN, _HEAD, _SIDE = 24.0, 76.0, 128.0
_BOX_HEIGHT, _BOX_PADDING = 30.0, 9.0
_PORT_PITCH = 13.0
_GAP, _GROUP_GAP = 8.0, 24.0
# More hosts than this stand upright, to keep the picture narrow.
_MAX_FLAT_HOSTS = 16
_MIN_WIDTH = 700.0
_DISC_RADIUS, _DISC_DISTANCE = 5.5, 17.0
# Queues below this share of the deepest are not drawn.
_SMALL_DEPTH_FRACTION = 0.02
_LEGEND_HEIGHT = 92.0


@dataclass(slots=True)
class _Box:
    """A node on the page: its centre and size."""

    node: GraphNode
    width: float
    height: float
    upright: bool
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class _Line:
    """A link on the page, from its lower end to its upper end."""

    link: GraphLink
    x1: float
    y1: float
    x2: float
    y2: float

    def at(self, fraction: float) -> tuple[float, float]:
        return self.x1 + (self.x2 - self.x1) * fraction, self.y1 + (self.y2 - self.y1) * fraction

    @property
    def length(self) -> float:
        return math.hypot(self.x2 - self.x1, self.y2 - self.y1)


def render_svg(graph: Graph) -> str:
    """Return the graph as an SVG document; the same graph gives the same text."""
    rows, width, bottom = _lay_out(graph)
    boxes = {box.node.name: box for row in rows for box in row}
    lines = _draw_lines(graph, boxes)
    height = bottom + (_LEGEND_HEIGHT if graph.measured else _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="{_FONT}" fill="#1d2733">',
        f"<title>{escape(graph.name)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="{_MARGIN:.0f}" y="34" font-size="18" font-weight="bold">{escape(graph.name)}</text>',
        f'<text x="{_MARGIN:.0f}" y="54" fill="#5a6673">{escape(_subtitle(graph))}</text>',
        *_render_tier_notes(rows, graph, boxes),
        *(_render_measured(graph, lines) if graph.measured else _render_plain(lines)),
        *(_render_box(box, graph) for row in rows for box in row),
        *(_render_legend(graph, bottom + 18) if graph.measured else ()),
        "</svg>",
    ]
    return "".join(f"{part}\n" for part in parts)


def _subtitle(graph: Graph) -> str:
    size = graph.describe_size()
    if not graph.measured or not graph.links:
        return size
    busiest = hottest(graph.directions())
    share = format_percent(busiest.utilisation_fraction or 0.0)
    return f"{size}; busiest: {busiest.src} > {busiest.dst}, {share}"


# --- layout ------------------------------------------------------------------------------------------------------------


def _lay_out(graph: Graph) -> tuple[list[list[_Box]], float, float]:
    """Return the boxes tier by tier from the top, the page's width, and where the lowest ends."""
    above, below = _neighbours(graph)
    rows = []
    for kind, nodes in graph.tiers():
        upright = kind == "host" and len(nodes) > _MAX_FLAT_HOSTS
        rows.append([_make_box(node, max(len(above[node.name]), len(below[node.name])), upright) for node in nodes])
    if not rows:
        return [], _MIN_WIDTH, _HEAD
    _place_lowest(rows[-1], above)
    placed = {box.node.name: box for box in rows[-1]}
    for row in reversed(rows[:-1]):
        _place_over(row, below, placed)
        placed |= {box.node.name: box for box in row}
    left, right = _extent(rows)
    span = max(right - left, _MIN_WIDTH - _SIDE - 2 * _MARGIN)
    shift = _MARGIN + _SIDE + (span - (right - left)) / 2 - left
    for box in placed.values():
        box.x += shift
    top = _HEAD
    for index, row in enumerate(rows):
        tall = max(box.height for box in row)
        for box in row:
            box.y, box.height = top + tall / 2, tall
        top += tall + (_gap_below(row, rows[index + 1], graph) if index + 1 < len(rows) else 0)
    return rows, span + _SIDE + 2 * _MARGIN, top


def _make_box(node: GraphNode, links: int, upright: bool) -> _Box:
    text = len(node.name) * _CHARACTER + 2 * _BOX_PADDING
    if upright:
        return _Box(node, max(22.0, links * _PORT_PITCH), text, upright)
    return _Box(node, max(text, links * _PORT_PITCH + 2 * _BOX_PADDING), _BOX_HEIGHT, upright)


def _neighbours(graph: Graph) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the nodes above and below each node, one entry a link."""
    above: dict[str, list[str]] = defaultdict(list)
    below: dict[str, list[str]] = defaultdict(list)
    for link in graph.links:
        above[link.a].append(link.b)
        below[link.b].append(link.a)
    return above, below


def _place_lowest(row: list[_Box], above: dict[str, list[str]]) -> None:
    """Put nodes side by side, those with the same parents together."""
    order = {
        name: index for index, name in enumerate(dict.fromkeys(one for box in row for one in above[box.node.name]))
    }
    row.sort(key=lambda box: tuple(sorted(order[name] for name in above[box.node.name])))  # stable
    x, parents = 0.0, None
    for box in row:
        mine = set(above[box.node.name])
        if parents is not None:
            x += _GAP if mine == parents else _GROUP_GAP
        parents = mine
        box.x = x + box.width / 2
        x += box.width


def _place_over(row: list[_Box], below: dict[str, list[str]], placed: dict[str, _Box]) -> None:
    """Put each node over the middle of what hangs from it; where several would stand at one place, spread all evenly."""
    left = min(box.x - box.width / 2 for box in placed.values())
    right = max(box.x + box.width / 2 for box in placed.values())
    for box in row:
        centres = [placed[name].x for name in below[box.node.name] if name in placed]
        box.x = sum(centres) / len(centres) if centres else (left + right) / 2
    crowded = any(second.x - first.x < (first.width + second.width) / 2 + _GAP for first, second in pairwise(row))
    if not crowded:
        return
    needed = sum(box.width for box in row) + _GROUP_GAP * (len(row) - 1)
    span = max(needed, right - left)
    pitch_room = (span - needed) / len(row)
    x = (left + right - span) / 2 + pitch_room / 2
    for box in row:
        box.x = x + box.width / 2
        x += box.width + _GROUP_GAP + pitch_room


def _extent(rows: Sequence[Sequence[_Box]]) -> tuple[float, float]:
    boxes = [box for row in rows for box in row]
    return min(box.x - box.width / 2 for box in boxes), max(box.x + box.width / 2 for box in boxes)


def _gap_below(upper: list[_Box], lower: list[_Box], graph: Graph) -> float:
    """Return the distance of two tiers: more where links are long, or they would be too flat to tell apart."""
    at = {box.node.name: box.x for box in (*upper, *lower)}
    reach = max((abs(at[link.a] - at[link.b]) for link in graph.links if link.a in at and link.b in at), default=0.0)
    return min(360.0, max(110.0, 0.24 * reach + 40))


def _draw_lines(graph: Graph, boxes: dict[str, _Box]) -> list[_Line]:
    """Return the links as lines between their nodes' edges; ends at one node stand apart, in the order of the far ends."""
    ends: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for index, link in enumerate(graph.links):
        ends[f"{link.a} up"].append((boxes[link.b].x, index))
        ends[f"{link.b} down"].append((boxes[link.a].x, index))
    place: dict[tuple[str, int], float] = {}
    for side, found in ends.items():
        box = boxes[side.rpartition(" ")[0]]
        room = min(box.width - 10, _PORT_PITCH * (len(found) - 1))
        for position, (_, index) in enumerate(sorted(found)):
            share = position / (len(found) - 1) - 0.5 if len(found) > 1 else 0.0
            place[side, index] = box.x + share * room
    return [
        _Line(
            link,
            place[f"{link.a} up", index],
            boxes[link.a].y - boxes[link.a].height / 2,
            place[f"{link.b} down", index],
            boxes[link.b].y + boxes[link.b].height / 2,
        )
        for index, link in enumerate(graph.links)
    ]


# --- drawing -----------------------------------------------------------------------------------------------------------


def _render_plain(lines: Sequence[_Line]) -> Iterator[str]:
    for line in lines:
        title = f"{line.link.up.src} - {line.link.down.src}: {line.link.describe_kind()}"
        yield _render_stroke(line.x1, line.y1, line.x2, line.y2, LINK_COLOUR, 1.3, title)


def _render_measured(graph: Graph, lines: Sequence[_Line]) -> Iterator[str]:
    """Yield the halves of all links, the busiest last and so on top, then the queues."""
    halves: list[tuple[float, int, str]] = []
    deepest = max((way.peak_depth_bytes or 0 for way in graph.directions()), default=0)
    discs: list[str] = []
    for index, line in enumerate(lines):
        middle = line.at(0.5)
        for way, x, y in ((line.link.up, line.x1, line.y1), (line.link.down, line.x2, line.y2)):
            stroke = _render_stroke(
                x,
                y,
                *middle,
                heat_of(way).colour,
                width_of(way),
                f"{describe_direction(way)}\n{line.link.describe_kind()}",
            )
            halves.append((way.utilisation_fraction or 0.0, index, stroke))
        discs += _render_queues(line, deepest)
    yield from (stroke for _, _, stroke in sorted(halves, key=lambda half: half[:2]))
    yield from discs


def _render_queues(line: _Line, deepest: int) -> Iterator[str]:
    for way, near in ((line.link.up, 0.0), (line.link.down, 1.0)):
        depth = way.peak_depth_bytes or 0
        if way.drops_packets or (deepest and depth >= _SMALL_DEPTH_FRACTION * deepest):
            away = min(0.4, _DISC_DISTANCE / max(1.0, line.length))
            yield _render_disc(*line.at(abs(near - away)), _disc_radius(depth, deepest), way)


def _disc_radius(depth: int, deepest: int) -> float:
    """Return a radius whose area, but for a least one, is in proportion to the depth."""
    return max(2.0, _DISC_RADIUS * math.sqrt(depth / deepest)) if deepest else 2.0


def _render_disc(x: float, y: float, radius: float, way: LinkDirection | None) -> str:
    dropped = way is not None and bool(way.drops_packets)
    fill = "#a3172a" if dropped else "#ffffff"
    title = f"<title>{escape(describe_direction(way))}</title>" if way is not None else ""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" stroke="#1d2733" stroke-width="1.2">'
        f"{title}</circle>"
    )


def _render_stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, title: str) -> str:
    """Return a line under a wider one that cannot be seen, for the pointer to find."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return (
        f"<g><title>{escape(title)}</title>"
        f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'
        f'<line {ends} stroke="#000" stroke-opacity="0" stroke-width="{max(8.0, width):g}"/></g>'
    )


def _render_box(box: _Box, graph: Graph) -> str:
    node = box.node
    fill, stroke = NODE_FILLS.get(node.kind, "#ffffff"), NODE_STROKES.get(node.kind, "#1d2733")
    turned = f' transform="rotate(-90 {box.x:.1f} {box.y:.1f})"' if box.upright else ""
    title = f"{node.name} ({node.kind}): {', '.join(node.ports)}" if node.ports else f"{node.name} ({node.kind})"
    return (
        f"<g><title>{escape(title)}</title>"
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.y - box.height / 2:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5" fill="{fill}" stroke="{stroke}" stroke-width="1.2"/>'
        f'<text x="{box.x:.1f}" y="{box.y:.1f}" text-anchor="middle" dy="0.35em"{turned}>'
        f"{escape(node.name)}</text></g>"
    )


def _render_tier_notes(rows: Sequence[Sequence[_Box]], graph: Graph, boxes: dict[str, _Box]) -> Iterator[str]:
    """Yield, at the left between two tiers, rate and delay of the links there."""
    for upper, lower in pairwise(rows):
        names = {box.node.name for box in lower}
        kinds = dict.fromkeys(
            link.describe_kind()
            for link in graph.links
            if link.a in names and boxes[link.b].node.kind == upper[0].node.kind
        )
        y = (upper[0].y + upper[0].height / 2 + lower[0].y - lower[0].height / 2) / 2
        texts = list(kinds) if len(kinds) <= 2 else [next(iter(kinds)), f"and {len(kinds) - 1} other kinds"]
        for number, text in enumerate(texts):
            yield (
                f'<text x="{_MARGIN:.0f}" y="{y + 16 * number:.1f}" fill="#5a6673" dy="0.35em">{escape(text)}</text>'
            )


def _render_legend(graph: Graph, top: float) -> Iterator[str]:
    """Yield scale, the meaning of the halves, and the deepest queue."""
    x, y = _MARGIN, top + 10
    yield f'<text x="{x:.0f}" y="{y:.1f}" dy="0.35em" fill="#5a6673">utilisation</text>'
    x += 78
    for index, step in enumerate(HEAT_SCALE):
        last = index == len(HEAT_SCALE) - 1
        used = 1.0 if last else (0.0 if index == 0 else step.limit_fraction)
        width = width_of(LinkDirection("", "", utilisation_fraction=used))
        yield (
            f'<line x1="{x:.0f}" y1="{y:.1f}" x2="{x + 26:.0f}" y2="{y:.1f}" stroke="{step.colour}" '
            f'stroke-width="{width:g}"/>'
        )
        yield f'<text x="{x + 32:.0f}" y="{y:.1f}" dy="0.35em">{escape(step.label)}</text>'
        x += 94
    y += 26
    yield (
        f'<text x="{_MARGIN:.0f}" y="{y:.1f}" dy="0.35em" fill="#5a6673">'
        "The half of a link at a node is what that node sends; a filled disc: frames were dropped.</text>"
    )
    deepest = max(graph.directions(), key=lambda way: way.peak_depth_bytes or 0, default=None)
    if deepest is not None and deepest.peak_depth_bytes:
        y += 24
        yield _render_disc(_MARGIN + _DISC_RADIUS, y, _DISC_RADIUS, None)
        text = (
            f"greatest depth of a queue, by area; this large: {format_depth(deepest.peak_depth_bytes)} at {deepest.src}"
        )
        yield f'<text x="{_MARGIN + 22:.0f}" y="{y:.1f}" dy="0.35em" fill="#5a6673">{escape(text)}</text>'
