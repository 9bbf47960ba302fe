"""The reference of the file format as Markdown, one block per key: ``docs/scenario.md`` is its output, and a test holds it to it.

What the models know (meaning, type, default, limits) is taken from their JSON schema; what a key is *not* is
written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.scenario.schema import render_json_schema
from testbed.units import format_size

_INTRODUCTION = """# Scenario reference

<!-- Written by `scripts/docs` from the models in testbed/scenario; do not edit. -->

A scenario is one YAML 1.2 file: a fabric, how it is run, what runs across it, and what is expected of it.
`testbed validate FILE` reports every mistake of a file at once; `testbed schema` prints the JSON schema, by which editors
complete and check it. `testbed run FILE --set KEY=VALUE` changes any key, such as `--set workload[0].size=16MiB`.

All quantities are those of the emulated fabric; only `time_dilation` knows how slowly this machine plays them.

Units are part of the text, for a number alone would be read as one unit by the writer and as another by the program:

- *rate*: `400 Gbit/s`, with `k`, `M`, `G`, `T` as powers of 1000;
- *size*: `64 MiB` (powers of 1024) or `800 KB` (powers of 1000); a number alone is bytes;
- *time*: `600 ns`, `2 us`, `1.5 ms`, `1 s`;
- *fraction*: `0.2`, `20 %` or `1/8`.

An unknown key is an error: nothing is read and then ignored.

A block says what the key means, then *Required*, *Default*, *Type*, and what the key *is not*.
"""

# What people take a key for, and it is not.
_IS_NOT: Mapping[str, str] = {
    "name": "the name of the lab; that is `--name`, and only by default the scenario's.",
    "fabric.host_link.rate": "what arrives as payload: headers, FCS, preamble and gap are on the wire too.",
    "fabric.host_link.delay": "all of the latency: the time to send a frame comes on top, at every hop. A switch's own "
    "forwarding time is not modelled; add it here.",
    "fabric.host_link.loss": "reproducible: every frame is a new draw, which does not follow `seed`. PFC frames and ARP "
    "are never lost.",
    "fabric.uplink.loss": "taken over from the host links.",
    "fabric.spines": "independent of the uplinks: each leaf has exactly one to every spine.",
    "fabric.uplink.rate": "the sum over the uplinks of a leaf: it is that of one.",
    "fabric.switch.buffer": "a limit per port: the ports of a switch share it, first come, first served.",
    "qos.lossless_priority": "a promise: without PFC a full buffer drops this priority like any other.",
    "routing.scheme": "aware of jobs or loads, but for `te`, which knows the traffic, and `adaptive`. All reroute around dead "
    "links, as late as the times below say.",
    "routing.convergence_time": "a protocol: no messages are exchanged, all switches change their tables at that moment.",
    "routing.resilient_hashing": "a memory: after a second failure flows that the first has moved may move once more.",
    "faults": "undone one by one: every iteration begins whole, but for what is broken from the beginning to the end.",
    "routing.hash_seed": "the seed of the run; that is `seed`.",
    "transport.mtu": "the MTU of the interface, which has room for the headers as well.",
    "transport.retransmit_timeout": "exact: the engine looks for timeouts every 16 ticks.",
    "transport.udp_source_port": "what pins a path: it is one of the five fields that `ecmp` hashes.",
    "transport.loss_recovery": "congestion control: go-back-N repeats everything from the lost packet on, at full rate.",
    "workload[].size": "the bytes on the wire, which follow from the algorithm: in a ring all-reduce over n ranks each sends "
    "2 (n - 1) / n times as much, and headers.",
    "workload[].max_size": "always one of the sizes: a sweep ends with the last that is not above it. The fabric is built once, "
    "and its time dilation chosen once, for all sizes; `expect` must hold at each.",
    "workload[].iters": "a number to average over: each iteration is timed on its own, and the median counts.",
    "workload[].warmup_iters": "in the counters, the completion times or the verdict.",
    "workload[].wall_timeout": "of the emulated fabric, as all other times are: programs see this machine's clock.",
    "workload[].setup": "repeated: it runs once, before the first iteration.",
    "workload[].commands[].command": "seen by the plan: neither paths nor completion times are predicted.",
    "workload[].order": "the placement of ranks: rank i is always the i-th GPU, of a job the i-th of its hosts.",
    "expect": "judged in rows whose verdict is `invalid`. A line must hold in every row of the table, one per workload item and "
    "size: it fails if a row that may be judged fails, and is `not_judged` if the others hold and one may not be judged. The "
    "exit code is then 4. A figure that an application did not write fails.",
    "time_dilation": "part of what is emulated: no figure of a result should depend on it. A smaller one makes a run shorter "
    "and less faithful; the verdict says when it was too small.",
    "seed": "a source of differences between two plans: the same seed gives the same plan, byte for byte.",
}


@dataclass(frozen=True, slots=True)
class _Key:
    """One key, or one of its shapes where it has several."""

    path: str
    shape: str
    required: bool
    schema: Mapping[str, Any]


def render_reference() -> str:
    """Return the reference of every key of the file format, as Markdown."""
    schema = json.loads(render_json_schema())
    defs = schema["$defs"]
    keys = list(_walk(schema, defs, "", ""))
    unknown = set(_IS_NOT) - {key.path for key in keys}
    assert not unknown, f"there is no key {unknown}"
    blocks: dict[str, dict[str, str]] = {}  # path, block, shape: what is alike in several shapes is written once
    for key in keys:
        blocks.setdefault(key.path, {}).setdefault(_render_block(key, defs), key.shape)
    lines = [_INTRODUCTION]
    for path, shapes in blocks.items():
        level = "##" if "." not in path else "###"
        for number, (block, shape) in enumerate(shapes.items()):
            suffix = f" ({shape})" if len(shapes) > 1 else ""
            note = f"- Is not: {_IS_NOT[path]}\n" if path in _IS_NOT and not number else ""
            lines.append(f"{level} `{path}`{suffix}\n\n{block}{note}")
    return "\n".join(lines)


def _walk(section: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, shape: str) -> Iterator[_Key]:
    """Yield the keys of a section, each followed by the keys below it."""
    required = section.get("required", [])
    for name, entry in section["properties"].items():
        path = f"{prefix}{name}"
        yield _Key(path, shape, name in required, entry)
        if path == "jobs[].workload":  # the same as `workload`
            continue
        listed = "items" in entry
        for target in _sections(entry.get("items", entry)):
            below = defs[target]
            yield from _walk(below, defs, f"{path}[]." if listed else f"{path}.", _shape_of(below))


def _sections(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of the sections that an entry refers to."""
    if "$ref" in entry:
        return [entry["$ref"].rpartition("/")[2]]
    return [name for one in (*entry.get("oneOf", ()), *entry.get("anyOf", ())) for name in _sections(one)]


def _shape_of(section: Mapping[str, Any]) -> str:
    """Return what tells a section from its alternatives, such as ``kind: star``."""
    for name in ("kind", "pattern"):
        names = section["properties"].get(name, {}).get("enum", ())
        if len(names) == 1:
            return f"{name}: {names[0]}"
    kinds = (("collective", "a collective"), ("application", "an application"))
    return next((shape for name, shape in kinds if name in section["properties"]), "")


def _render_block(key: _Key, defs: Mapping[str, Any]) -> str:
    schema = key.schema
    sections = _sections(schema)
    described = schema.get("description") or defs[sections[0]]["description"]
    text, _, computed = described.partition(" Default: ")
    facts = [f"- Required: {'yes' if key.required else 'no'}"]
    if not key.required:
        default = computed.rstrip(".") or _render_default(schema)
        facts.append(f"- Default: {default}")
    facts.append(f"- Type: {_describe_type(schema, defs)}")
    return "\n".join([text, "", *facts, ""])


def _render_default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    if default is None:
        return "absent"
    if default == {}:
        return "the defaults of its keys"
    if default == []:
        return "none"
    return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default or chr(34) * 2}`"


def _describe_type(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    sections = _sections(schema)
    if sections:
        shapes = [shape for shape in (_shape_of(defs[name]) for name in sections) if shape]
        return "section" + (f", one of: {', '.join(f'`{shape}`' for shape in shapes)}" if len(shapes) > 1 else "")
    forms = [form for form in schema.get("anyOf", [schema]) if form.get("type") != "null"]
    if schema.get("type") == "array":
        items = schema["items"]
        return "list of sections" if _sections(items) else "list"
    words = [word for word in (_describe_form(form, forms) for form in forms) if word]
    return " or ".join(dict.fromkeys(words))


def _describe_form(form: Mapping[str, Any], forms: list[Mapping[str, Any]]) -> str:
    """Return one form of a value in words; "" for the plain number that a size or a fraction may also be."""
    patterns = [str(one.get("pattern", "")) for one in forms]
    pattern = str(form.get("pattern", ""))
    size = any("iB" in one for one in patterns)
    if "enum" in form:
        zero_time = form["enum"] == [0] and any("ns" in one for one in patterns)
        return (
            "" if zero_time else "one of " * (len(form["enum"]) > 1) + ", ".join(f"`{name}`" for name in form["enum"])
        )
    if form.get("type") == "boolean":
        return "`true` or `false`"
    if form.get("type") in ("integer", "number"):
        low, high = form.get("minimum"), form.get("maximum")
        if size:
            return f"size, {format_size(int(low or 0))} to {format_size(int(high or 0))}"
        kind = "integer" if form["type"] == "integer" else "number"
        bounds = " to ".join(f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (low, high))
        return f"{'fraction' if any('%' in one for one in patterns) else kind}, {bounds}"
    if form.get("type") == "array":
        return f"list of integers, {form['items']['minimum']} to {form['items']['maximum']}"
    if form.get("type") == "object":
        return "mapping of names to texts"
    if "bit/s" in pattern:
        return "rate"
    if "ns" in pattern:
        return "time"
    if "iB" in pattern or "%" in pattern:
        return ""
    return f"text, at most {form['maxLength']} characters" if "maxLength" in form else "text"


if __name__ == "__main__":
    print(render_reference(), end="")
