from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import testbed.fabric.fabric as fabric_module
import testbed.scenario
from testbed import collectives
from testbed.errors import ScenarioError
from testbed.scenario import (
    ClosFabric,
    Collective,
    FlowsWorkload,
    IncastWorkload,
    Pattern,
    PermutationWorkload,
    RankOrder,
    StarFabric,
    Verdict,
    evaluate,
    load_scenario,
    parse_expectation,
    render_json_schema,
)
from testbed.scenario.document import MAX_CHARACTERS
from testbed.scenario.expect import METRICS, ExpectationError
from testbed.scenario.keypath import parse_path, render_path
from testbed.scenario.rules import ALGORITHMS, MAX_CONNECTIONS

ROOT = Path(__file__).parents[2]
AI_ZONE = (ROOT / "scenarios" / "ai-zone.yaml").read_text(encoding="utf-8")
MINIMAL = """
name: small
fabric: {kind: clos, leaves: 2, spines: 2, hosts_per_leaf: 2, host_link: {rate: 400 Gbit/s, delay: 1 us}}
workload: [{collective: all_reduce, size: 1 MiB}]
"""


def mistakes_of(text: str, *overrides: str) -> dict[str, str]:
    """Return rule by key for text that must be mistaken."""
    with pytest.raises(ScenarioError) as caught:
        load_scenario(text, overrides)
    return {mistake.key: mistake.rule for mistake in caught.value.mistakes}


class TestShippedScenarios:
    def test_ai_zone_is_what_the_issue_asks_for(self) -> None:
        scenario = load_scenario(ROOT / "scenarios" / "ai-zone.yaml")
        fabric = scenario.fabric
        assert isinstance(fabric, ClosFabric)
        assert (fabric.leaves, fabric.spines, fabric.host_counts) == (4, 4, (4, 4, 4, 4))
        assert fabric.host_link.rate_bits_per_s == fabric.uplink.rate_bits_per_s == 400 * 10**9
        assert scenario.routing.scheme == "pinning"
        (item,) = scenario.collectives
        assert (item.collective, item.order, item.size_bytes) == (Collective.ALL_REDUCE, RankOrder.RAILS, 64 * 2**20)

    def test_star_has_one_switch(self) -> None:
        scenario = load_scenario(str(ROOT / "scenarios" / "star.yaml"))
        assert isinstance(scenario.fabric, StarFabric)
        assert scenario.fabric.host_counts == (8,)


class TestDefaults:
    def test_minimal_scenario_has_documented_defaults(self) -> None:
        scenario = load_scenario(MINIMAL)
        assert scenario.fabric.switch.buffer_bytes == 32 * 2**20
        assert scenario.transport.mtu_bytes == 4096
        assert scenario.transport.retransmit_timeout_ns is None
        assert scenario.time_dilation is None
        assert not scenario.qos.ecn.enabled
        assert not scenario.qos.pfc.enabled
        assert scenario.workload[0].iters == 3

    def test_uplink_takes_over_what_it_is_not_given(self) -> None:
        fabric = load_scenario(MINIMAL, ["fabric.uplink.rate=800 Gbit/s"]).fabric
        assert isinstance(fabric, ClosFabric)
        assert (fabric.uplink.rate_bits_per_s, fabric.uplink.delay_ns) == (800 * 10**9, 1000)

    def test_hash_follows_the_seed_unless_it_has_its_own(self) -> None:
        assert load_scenario(MINIMAL, ["seed=7"]).routing.hash_seed == 7
        assert load_scenario(MINIMAL, ["seed=7", "routing.hash_seed=3"]).routing.hash_seed == 3

    def test_send_recv_is_direct(self) -> None:
        scenario = load_scenario(MINIMAL, ["workload[0].collective=send_recv"])
        assert scenario.collectives[0].algorithm == "direct"

    @pytest.mark.parametrize("collective", Collective)
    def test_algorithm_is_the_first_of_the_collective(self, collective: Collective) -> None:
        scenario = load_scenario(MINIMAL, [f"workload[0].collective={collective}"])
        assert scenario.collectives[0].algorithm == ALGORITHMS[collective][0]

    def test_scenario_is_frozen(self) -> None:
        scenario = load_scenario(MINIMAL)
        with pytest.raises(ValidationError):
            scenario.seed = 2


class TestYaml:
    def test_yaml_is_1_2(self) -> None:
        assert load_scenario(MINIMAL + "description: yes\n").description == "yes"
        assert load_scenario(MINIMAL + "description: 2020-01-01\n").description == "2020-01-01"

    def test_anchors_are_expanded(self) -> None:
        text = MINIMAL.replace("host_link: {", "host_link: &link {").replace("}}", "}, uplink: *link}")
        fabric = load_scenario(text, ["fabric.uplink.delay=5 us"]).fabric
        assert isinstance(fabric, ClosFabric)
        assert (fabric.host_link.delay_ns, fabric.uplink.delay_ns) == (1000, 5000)

    def test_byte_order_mark_is_no_mistake(self, tmp_path: Path) -> None:
        file = tmp_path / "bom.yaml"
        file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
        assert load_scenario(file).name == "small"

    def test_unreadable_file_is_named(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent.yaml", tmp_path):
            with pytest.raises(ScenarioError, match="cannot be read"):
                load_scenario(path)

    def test_huge_text_is_refused_at_once(self) -> None:
        assert "" in mistakes_of("a" * (MAX_CHARACTERS + 1))

    @pytest.mark.parametrize(
        "text", ["[" * 400, "- " * 400, "{" * 400, '"\\UFFFFFFFF"', "%YAML 9.9\n---\na: 1", "\x00"]
    )
    def test_pathological_yaml_is_a_mistake(self, text: str) -> None:
        mistakes_of(text)

    def test_countless_mistakes_are_cut_short(self) -> None:
        with pytest.raises(ScenarioError) as caught:
            load_scenario("workload:\n" + "- {}\n" * 3000)
        assert len(caught.value.mistakes) == 101


class TestOverrides:
    def test_lists_take_both_spellings(self) -> None:
        for key in ("workload.0.size", "workload[0].size"):
            assert load_scenario(MINIMAL, [f"{key}=8 MiB"]).collectives[0].size_bytes == 8 * 2**20

    def test_item_can_be_appended(self) -> None:
        scenario = load_scenario(
            MINIMAL, ["workload[1]={collective: send_recv, size: 1 KiB}", "expect[0]=cct_ratio < 2"]
        )
        assert len(scenario.workload) == 2
        assert len(scenario.expect) == 1

    def test_missing_sections_are_added(self) -> None:
        assert load_scenario(MINIMAL, ["qos.pfc.enabled=false"]).qos.pfc.enabled is False

    def test_later_override_wins(self) -> None:
        assert load_scenario(MINIMAL, ["seed=2", "seed=3"]).seed == 3

    def test_override_mends_a_mistake_of_the_file(self) -> None:
        assert load_scenario(MINIMAL.replace("1 MiB", "1 MB B"), ["workload[0].size=1 MiB"])

    def test_paths_are_read_back(self) -> None:
        for text in ("a", "a.b", "a[0].b", "workload[12]"):
            path = parse_path(text)
            assert path is not None
            assert render_path(path) == text
        assert parse_path("a..b") is None
        assert parse_path("[0]") is None


class TestMistakes:
    def test_line_is_that_of_the_key(self) -> None:
        with pytest.raises(ScenarioError) as caught:
            load_scenario(AI_ZONE.replace("mtu: 4096", "mtu: 4097"))
        (mistake,) = caught.value.mistakes
        assert AI_ZONE.splitlines()[mistake.line - 1].strip().startswith("mtu:")
        assert mistake.got == "4097"

    def test_every_section_refuses_unknown_keys(self) -> None:
        for section in (
            "fabric",
            "fabric.host_link",
            "fabric.switch",
            "qos",
            "qos.ecn",
            "qos.pfc",
            "routing",
            "transport",
        ):
            assert mistakes_of(MINIMAL, f"{section}.zzzz=1") == {f"{section}.zzzz": "is not a known key"}

    def test_bracketed_keys_do_not_confuse_the_paths(self) -> None:
        found = mistakes_of(MINIMAL.replace("kind: clos", "kind: clos, <clos>: 1") + "<star>: 1\n")
        assert set(found) == {"fabric.<clos>", "<star>"}


class TestWorkload:
    def test_algorithms_are_those_that_exist(self) -> None:
        for collective, named in collectives.ALGORITHMS.items():
            assert [str(one) for one in ALGORITHMS[Collective(collective)]] == list(named)
        assert {str(one) for one in Collective} == {str(one) for one in collectives.Collective}
        assert [str(one) for one in Pattern] == [str(one) for one in collectives.Pattern]
        assert {str(one) for one in RankOrder} == {str(one) for one in collectives.RingOrder}

    def test_connections_fit_into_the_qp_table(self) -> None:
        assert 2 * MAX_CONNECTIONS == fabric_module._QP_ROWS

    def test_patterns_are_read(self) -> None:
        incast = load_scenario(MINIMAL, ["workload[0]={pattern: incast, fan_in: 3, size: 1 KiB}"]).workload[0]
        assert isinstance(incast, IncastWorkload)
        assert (incast.fan_in, incast.size_bytes, incast.iters) == (3, 1024, 3)
        permutation = load_scenario(MINIMAL, ["workload[0]={pattern: permutation, size: 1 KiB}"]).workload[0]
        assert isinstance(permutation, PermutationWorkload)
        flows = load_scenario(
            MINIMAL, ["workload[0]={pattern: flows, flows: [{src: 3, dst: 0, size: 1 B}, {src: 3, dst: 0, size: 2 B}]}"]
        ).workload[0]
        assert isinstance(flows, FlowsWorkload)
        assert [(one.src, one.dst, one.size_bytes) for one in flows.flows] == [(3, 0, 1), (3, 0, 2)]
        assert not load_scenario(MINIMAL, ["workload[0]={pattern: permutation, size: 1 KiB}"]).collectives

    def test_fewer_bytes_than_ranks_are_enough_for_a_broadcast(self) -> None:
        for collective in ("broadcast", "reduce", "send_recv"):
            assert load_scenario(MINIMAL, [f"workload[0]={{collective: {collective}, size: 1 B}}"])


class TestExpectations:
    def test_values_take_units(self) -> None:
        assert parse_expectation("cct_ns < 3 ms").value == 3e6
        assert parse_expectation("cct_ns<3").value == 3
        assert parse_expectation("busbw_bytes_per_s >= 45 GB/s").value == 45e9
        assert parse_expectation("cct_ratio<=101 %").value == 1.01

    @pytest.mark.parametrize("metric", METRICS)
    def test_every_metric_takes_a_plain_number(self, metric: str) -> None:
        assert parse_expectation(f"{metric} != 0").value == 0

    @pytest.mark.parametrize(
        "line",
        ["", "cct_ratio", "cct_ratio = 1", "cct_ratio => 1", "cct_ratio <= -1", "drops_packets == 1 B", "x == 1"],
    )
    def test_unreadable_line_is_refused(self, line: str) -> None:
        with pytest.raises(ExpectationError):
            parse_expectation(line)

    @pytest.mark.parametrize(
        ("operator", "below", "equal", "above"),
        [
            ("==", "fail", "pass", "fail"),
            ("!=", "pass", "fail", "pass"),
            ("<=", "pass", "pass", "fail"),
            ("<", "pass", "fail", "fail"),
            (">=", "fail", "pass", "pass"),
            (">", "fail", "fail", "pass"),
        ],
    )
    def test_operators(self, operator: str, below: str, equal: str, above: str) -> None:
        line = parse_expectation(f"cct_ratio {operator} 1.5")
        assert [evaluate(line, observed, True) for observed in (1.0, 1.5, 2.0)] == [below, equal, above]

    def test_what_was_not_measured_or_not_trusted_is_not_judged(self) -> None:
        line = parse_expectation("cct_ratio <= 1")
        assert evaluate(line, None, True) is Verdict.NOT_JUDGED
        assert evaluate(line, 1.0, False) is Verdict.NOT_JUDGED
        assert evaluate(line, float("nan"), True) is Verdict.NOT_JUDGED


def test_shipped_schema_is_that_of_the_models(update_golden: bool) -> None:
    shipped = Path(testbed.scenario.__file__).with_name("schema.json")
    if update_golden:
        shipped.write_text(render_json_schema(), encoding="utf-8")
    assert shipped.read_text(encoding="utf-8") == render_json_schema(), "run: pytest --update-golden tests/unit"


def test_schema_describes_every_key() -> None:
    schema = json.loads(render_json_schema())
    for section in [schema, *schema["$defs"].values()]:
        for key, entry in section["properties"].items():
            target = schema["$defs"][entry["$ref"].rpartition("/")[2]] if "$ref" in entry else entry
            assert entry.get("description") or target.get("description"), key


def test_schema_states_defaults_as_users_write_them() -> None:
    schema = json.loads(render_json_schema())
    assert schema["$defs"]["Switch"]["properties"]["buffer"]["default"] == "32 MiB"
    assert schema["properties"]["time_dilation"]["default"] == "auto"


RATES = st.integers(10**6, 1_600 * 10**9).map(lambda rate: f"{rate} bit/s")
LINKS = st.fixed_dictionaries({"rate": RATES}, optional={"delay": st.integers(0, 10**9).map(lambda ns: f"{ns} ns")})
EXPECTATIONS = st.sampled_from(
    ["cct_ratio <= 1.05", "drops_packets == 0", "cct_ns < 3 ms", "busbw_bytes_per_s>=4 GB/s"]
)


@st.composite
def fabrics(draw: st.DrawFn) -> dict[str, Any]:
    fabric: dict[str, Any] = {"host_link": draw(LINKS)}
    if draw(st.booleans()):
        fabric["switch"] = {"buffer": draw(st.integers(5000, 2**34))}
    if draw(st.booleans()):
        return {**fabric, "kind": "star", "hosts_per_leaf": draw(st.integers(2, 1024))}
    leaves = draw(st.integers(1, 16))
    each = st.lists(st.integers(1, 64), min_size=leaves, max_size=leaves)
    hosts = draw(st.one_of(st.integers(2, 64), each.filter(lambda counts: sum(counts) > 1)))
    fabric |= {"kind": "clos", "leaves": leaves, "spines": draw(st.integers(1, 16)), "hosts_per_leaf": hosts}
    if draw(st.booleans()):
        fabric["uplink"] = draw(LINKS)
    return fabric


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    rounds = {"iters": st.integers(1, 10_000), "warmup_iters": st.integers(0, 10_000)}
    size = st.integers(1024, 2**34)
    known = st.sampled_from([str(one) for one in Collective if one is not Collective.ALL_TO_ALL])
    flow = st.fixed_dictionaries({"src": st.just(0), "dst": st.just(1), "size": size})
    item = st.one_of(
        st.fixed_dictionaries(
            {"collective": known, "size": size},
            optional={"order": st.sampled_from(["rails", "packed", "random"]), **rounds},
        ),
        st.fixed_dictionaries({"pattern": st.just("incast"), "fan_in": st.just(1), "size": size}, optional=rounds),
        st.fixed_dictionaries({"pattern": st.just("permutation"), "size": size}, optional=rounds),
        st.fixed_dictionaries(
            {"pattern": st.just("flows"), "flows": st.lists(flow, min_size=1, max_size=3)}, optional=rounds
        ),
    )
    return {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)),
        "description": draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)),
        "fabric": draw(fabrics()),
        "workload": draw(st.lists(item, min_size=1, max_size=3)),
        "expect": draw(st.lists(EXPECTATIONS, max_size=3)),
        "routing": {"scheme": draw(st.sampled_from(["ecmp", "pinning"]))},
        "transport": {
            "mtu": draw(st.sampled_from([256, 512, 1024, 2048, 4096])),
            "udp_source_port": draw(st.sampled_from(["per_pair", "per_qp"])),
            "retransmit_timeout": draw(st.sampled_from(["auto", "10 s"])),
        },
        "time_dilation": draw(st.one_of(st.just("auto"), st.integers(1, 10**6), st.floats(1, 10**6))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=40, deadline=None)
@given(scenarios())
def test_resolved_scenario_loads_to_an_equal_one(data: dict[str, Any]) -> None:
    scenario = load_scenario(json.dumps(data))
    text = json.dumps(scenario.resolved())
    again = load_scenario(text)
    assert again == scenario
    assert again.resolved() == scenario.resolved()


@pytest.mark.parametrize("ascii_only", [True, False])
def test_character_beyond_the_first_plane_is_one_however_json_writes_it(ascii_only: bool) -> None:
    data = load_scenario(MINIMAL).resolved() | {"description": "\U00010000"}
    assert load_scenario(json.dumps(data, ensure_ascii=ascii_only)).description == "\U00010000"


def test_resolved_explicit_order_loads_to_an_equal_one() -> None:
    scenario = load_scenario(MINIMAL, ["workload[0].order=[3, 1, 0, 2]"])
    assert scenario.collectives[0].order == (3, 1, 0, 2)
    assert load_scenario(json.dumps(scenario.resolved())) == scenario


# --- No input raises anything but ScenarioError ---

ALPHABET = st.sampled_from(list("{}[],:-#&*!|>'\"%@` \n\tabz019./µ\x00\ufeff\ud800~<=?"))
FRAGMENTS = st.sampled_from(
    [
        "name: a\n",
        "fabric: ",
        "{kind: clos",
        "{kind: star",
        "leaves: 2, ",
        "&a ",
        "*a",
        "!!str ",
        "<<: ",
        "- ",
        "null",
        "? ",
        "---\n",
        "400 Gbit/s",
        "workload:\n",
        "order: [0, 0]",
        "1e999999",
        "9" * 60,
        "expect: ",
        "cct_ratio <= ",
        "\n  ",
        ".inf",
        "0x",
    ]
)
KEYS = st.sampled_from(
    sorted(
        {
            "transport",
            "carrier",
            "fabric",
            "kind",
            "jobs",
            "faults",
            "0",
            "slow_receiver",
            "admission",
            "scheme",
            "loss_recovery",
            "<clos>",
            "",
        }
    )
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), KEYS)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)


def load_or_scenario_error(text: str, *overrides: str) -> None:
    error = None
    try:
        load_scenario(text, overrides)
    except ScenarioError as caught:
        error = caught
    if error is not None:
        assert error.mistakes
        assert "pydantic" not in str(error).lower()
        assert "\n" not in "".join(mistake.describe("file") + mistake.hint for mistake in error.mistakes)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(ALPHABET, max_size=60).map("".join),
        st.lists(FRAGMENTS, max_size=20).map("".join),
    )
)
def test_any_text_loads_or_is_a_scenario_error(text: str) -> None:
    load_or_scenario_error(text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES)
def test_any_tree_loads_or_is_a_scenario_error(tree: Any) -> None:
    load_or_scenario_error(json.dumps(tree))


PATHS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(KEYS, st.sampled_from(["workload", "expect", "0", "1", "99"])), max_size=5).map(".".join),
)
VALUES = st.one_of(st.text(max_size=30), TREES.map(json.dumps), st.lists(FRAGMENTS, max_size=4).map("".join))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.text(max_size=30), st.tuples(PATHS, VALUES).map("=".join)), max_size=3))
def test_any_override_applies_or_is_a_scenario_error(overrides: list[str]) -> None:
    load_or_scenario_error(MINIMAL, *overrides)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_value_at_any_key_loads_or_is_a_scenario_error(data: st.DataObject) -> None:
    tree = load_scenario(AI_ZONE).resolved()
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = tree
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                place[key] = data.draw(TREES)
                break
            place = place[key]
    load_or_scenario_error(json.dumps(tree))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_any_file_loads_or_is_a_scenario_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    with pytest.raises(ScenarioError):
        load_scenario(file)
