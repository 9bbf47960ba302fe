"""Pictures of fabrics: nothing overlaps at any size, heat says what was measured, odd fabrics draw too."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed import api
from testbed.cli.graph import FORMATS
from testbed.cli.main import app
from testbed.errors import TestbedError
from testbed.results import CollectiveResult, FabricResult, LinkDirection, LinkResult, Result, render_json
from testbed.results.graph import (
    HEAT_SCALE,
    Graph,
    GraphFormat,
    GraphLink,
    GraphNode,
    heat_of,
    render_dot,
    render_mermaid,
    width_of,
)
from testbed.results.graph_svg import render_svg

SCENARIOS = Path(__file__).parents[2] / "scenarios"
AI_ZONE = SCENARIOS / "ai-zone.yaml"
SVG = "{http://www.w3.org/2000/svg}"


def clos(leaves: int, spines: int, hosts_per_leaf: int) -> Graph:
    sizes = [f"fabric.leaves={leaves}", f"fabric.spines={spines}", f"fabric.hosts_per_leaf={hosts_per_leaf}"]
    return api.describe_graph(api.load(AI_ZONE, sizes))


def link(a: str, b: str, **figures: float) -> GraphLink:
    up, down = LinkDirection(f"{a}/x", f"{b}/y", **figures), LinkDirection(f"{b}/y", f"{a}/x")  # type: ignore[arg-type]
    return GraphLink(a, b, 400_000_000_000, 600, up, down)


def rails() -> Graph:
    hosts, leaves = [f"host{i}" for i in range(4)], [f"leaf{i}" for i in range(4)]
    nodes = [GraphNode(name, "host") for name in hosts] + [GraphNode(name, "leaf") for name in leaves]
    nodes += [GraphNode("spine0", "spine"), GraphNode("super0", "superspine")]
    links = [link(host, leaf) for host in hosts for leaf in leaves]
    links += [link(leaf, "spine0") for leaf in leaves] + [link("spine0", "super0")]
    return Graph('<rails> & "more"', tuple(nodes), tuple(links))


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Return the nodes' rectangles by label: left, top, right, bottom."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        if rect is not None and text is not None:
            x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            found[str(text.text)] = (x, y, x + width, y + height)
    return found


@pytest.mark.parametrize(
    "graph",
    [clos(2, 2, 2), clos(4, 4, 4), clos(8, 8, 8), clos(2, 8, 1), clos(8, 1, 3), clos(1, 1, 2), rails()],
    ids=["2x2x2", "4x4x4", "8x8x8", "many-spines", "one-spine", "least", "rails"],
)
def test_no_two_boxes_overlap_and_all_are_on_the_page(graph: Graph) -> None:
    svg = render_svg(graph)
    placed = boxes(svg)
    assert set(placed) == {node.name for node in graph.nodes}
    for one, other in itertools.combinations(placed.values(), 2):
        apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
        assert apart, (one, other)
    page = ElementTree.fromstring(svg).attrib
    for left, top, right, bottom in placed.values():
        assert 0 <= left < right <= float(page["width"])
        assert 60 <= top < bottom <= float(page["height"])
    # Links end at their nodes' edges: one stroke each to be seen.
    assert svg.count('stroke-width="1.3"') == len(graph.links)


def test_hosts_stand_under_their_leaf_and_below_spines() -> None:
    placed = boxes(render_svg(clos(4, 4, 4)))
    middle = {name: (box[0] + box[2]) / 2 for name, box in placed.items()}
    for leaf in range(4):
        under = [middle[f"host{host}"] for host in range(4 * leaf, 4 * leaf + 4)]
        assert min(under) < middle[f"leaf{leaf}"] < max(under)
    assert placed["spine0"][3] < placed["leaf0"][1] < placed["leaf0"][3] < placed["host0"][1]


def test_heat_grows_with_utilisation_in_colour_and_width() -> None:
    ways = [LinkDirection("a", "b", utilisation_fraction=used) for used in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)]
    colours = [heat_of(way).colour for way in ways]
    assert colours == [step.colour for step in HEAT_SCALE] + [HEAT_SCALE[-1].colour]
    widths = [width_of(way) for way in ways]
    assert widths == sorted(widths)
    assert widths[-1] == widths[-2]
    unmeasured = LinkDirection("a", "b")
    assert heat_of(unmeasured).label == "idle"


def result_file(folder: Path) -> Path:
    scenario = api.load(AI_ZONE, ["fabric.leaves=2", "fabric.spines=2", "fabric.hosts_per_leaf=2"])
    graph = api.describe_graph(scenario)
    links = [
        LinkResult(
            f"{one.a}:{one.b}",
            (
                LinkDirection(one.up.src, one.up.dst, 10, 1, 0.971 if one.up.src == "leaf0/up1" else 0.1, 3 << 20, 0),
                LinkDirection(one.down.src, one.down.dst, 0, 0, 0.0, 0, 5 if one.down.src == "spine0/down0" else 0),
            ),
        )
        for one in graph.links
    ]
    row = CollectiveResult("all_reduce", "ring", 1, 4)
    result = Result(scenario.resolved(), 1, 1000.0, {}, (row,), FabricResult(links=tuple(links)))
    file = folder / "result.json"
    file.write_text(render_json(result))
    return file


def test_graph_of_a_result_shows_load_queue_and_drops(tmp_path: Path) -> None:
    file = result_file(tmp_path)
    picture = tmp_path / "heat.svg"
    done = CliRunner().invoke(app, ["graph", "--result", str(file), "-o", str(picture)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    svg = picture.read_text()
    assert "busiest: leaf0/up1 &gt; spine1/down0, 97.1 %" in svg
    assert "leaf0/up1 &gt; spine1/down0: 97.1 %, 1 packets, peak queue 3 MiB" in svg
    assert "spine0/down0 &gt; leaf0/up0: 0.0 %, 0 packets, peak queue 0 B, 5 drops" in svg
    assert "this large: 3 MiB at" in svg
    graph = api.describe_result_graph(file)
    assert api.describe_result_graph(tmp_path) == graph  # the folder will do
    assert re.search(r"linkStyle \d+ stroke:#a3172a,stroke-width:5.86px", render_mermaid(graph))
    assert '#c4ccd4;0.5:#a3172a"' in render_dot(graph)


def test_graph_writes_what_the_output_is_called_or_the_format_says(tmp_path: Path) -> None:
    def drawn(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["graph", str(AI_ZONE), *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert drawn().startswith("---\ntitle: ")
    assert drawn("--format", "dot").startswith('graph "')
    assert drawn("--format", "svg").startswith("<svg ")
    for name, begin in (("a.svg", "<svg"), ("a.dot", "graph"), ("a.gv", "graph"), ("a.md", "---")):
        assert drawn("-o", str(tmp_path / name)) == ""
        assert (tmp_path / name).read_text().startswith(begin)
    assert drawn("--set", "fabric.spines=2").count("spine") < drawn().count("spine")
    assert tuple(GraphFormat) == FORMATS


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    def code(*arguments: str) -> int:
        return CliRunner().invoke(app, ["graph", *arguments]).exit_code

    assert code() == 2
    assert code(str(AI_ZONE), "--result", "x") == 2
    assert code(str(AI_ZONE), "--format", "png") == 2
    assert code("--result", "x", "--set", "seed=1") == 2
    with pytest.raises(TestbedError, match="cannot be read"):
        api.describe_result_graph(tmp_path / "none.json")
    for content in ("", "{}", "[]", "3", json.dumps({"schema_version": 1}), '{"schema_version": 99}', "\xff"):
        file = tmp_path / "bad.json"
        file.write_text(content, encoding="latin-1")
        with pytest.raises(TestbedError, match=r"bad\.json"):
            api.describe_result_graph(file)
    broken = json.loads(result_file(tmp_path).read_text())
    broken["scenario"] = {"name": "x"}
    file.write_text(json.dumps(broken))
    with pytest.raises(TestbedError, match=r"bad\.json"):
        api.describe_result_graph(file)


def test_an_empty_graph_and_one_without_links_are_drawn() -> None:
    for nodes in ((), (GraphNode("host0", "host"),), (GraphNode("box0", "unheard-of"),)):
        graph = Graph("empty", nodes, ())
        ElementTree.fromstring(render_svg(graph))
        assert all(node.name in render_dot(graph) and node.name in render_mermaid(graph) for node in nodes)


def test_names_are_quoted_in_every_language() -> None:
    graph = rails()
    assert ElementTree.fromstring(render_svg(graph)).findtext(f"{SVG}title") == graph.name
    assert 'graph "<rails> & \\"more\\"" {' in render_dot(graph)


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed (apt install graphviz)")
def test_graphviz_accepts_the_dot_text(tmp_path: Path) -> None:
    for graph in (rails(), api.describe_result_graph(result_file(tmp_path))):
        done = subprocess.run(["dot", "-Tsvg"], input=render_dot(graph), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr


def test_paths_of_a_result_compare_what_links_carried_with_what_was_predicted(tmp_path: Path) -> None:
    file = result_file(tmp_path)
    compared = api.compare_paths(tmp_path)
    assert compared == api.compare_paths(file)
    sent = {link.name.split(">")[0]: link for link in compared.links}
    assert sent["leaf0/up1"].measured_bytes == 10
    # Pinned ring of four ranks: each sends 1.5 times 64 MiB, in frames of 4096 bytes and their headers, three times.
    for port in ("host0/eth0", "leaf0/up0", "leaf0/up1", "spine0/down1"):
        assert sent[port].predicted_bytes == pytest.approx(3 * 1.5 * 64 * 2**20 * (4096 + 58) / 4096, rel=1e-3)
    shown = CliRunner().invoke(app, ["paths", str(tmp_path)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "leaf0/up1>spine1/down0" in shown.stdout
    assert "predicted ratio" in shown.stdout


def test_paths_of_what_is_no_result_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["paths", str(tmp_path)])
    assert done.exit_code != 0
