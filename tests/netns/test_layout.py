"""The numpy twins of the eBPF structs, byte by byte against the compiled object's own type information."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from typing import Any

import pytest

from testbed.kernel import layout
from testbed.kernel.bpf import OBJECT_PATH
from tests.conftest import skip_or_fail

TWINS = {
    "tb_port": layout.PORT,
    "tb_queue": layout.QUEUE,
    "tb_node": layout.NODE,
    "tb_group": layout.GROUP,
    "tb_qp": layout.QP,
}
CONFIG = {
    "ifindex_base": 1000,
    "ports": 17,
    "slots": 8,
    "host_network": 0x0A000000,
    "qpn_base": 0x100,
    "qps": 16384,
    "control_priorities": 0xC0,
    "data_classes": 0x11132111,
}

pytestmark = pytest.mark.root  # bpftool lives in sbin and wants it


@pytest.fixture(scope="module")
def types() -> dict[int, dict[str, Any]]:
    """The object's BTF, by type id."""
    # Ubuntu's is a script that finds nothing to start unless the tools of the very kernel are installed.
    if shutil.which("bpftool") is None or subprocess.run(["bpftool", "version"], capture_output=True).returncode:
        skip_or_fail("needs bpftool (on Ubuntu: apt-get install linux-tools-$(uname -r))")
    assert OBJECT_PATH.exists(), "scripts/build-bpf"
    dumped = subprocess.run(
        ["bpftool", "btf", "dump", "-j", "file", str(OBJECT_PATH)], check=True, capture_output=True, text=True
    )
    return {entry["id"]: entry for entry in json.loads(dumped.stdout)["types"]}


def find_type(types: dict[int, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (entry for entry in types.values() if entry["kind"] == kind and entry["name"] == name)
    return found


def resolve(types: dict[int, dict[str, Any]], number: int) -> dict[str, Any]:
    entry = types[number]
    while entry["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
        entry = types[entry["type_id"]]
    return entry


def size_of(types: dict[int, dict[str, Any]], number: int) -> int:
    entry = resolve(types, number)
    if entry["kind"] == "ARRAY":
        return int(entry["nr_elems"]) * size_of(types, entry["type_id"])
    return int(entry["size"])


@pytest.mark.parametrize("name", sorted(TWINS))
def test_struct_equals_its_numpy_twin(types: dict[int, dict[str, Any]], name: str) -> None:
    compiled, twin = find_type(types, "STRUCT", name), TWINS[name]
    assert twin.itemsize == compiled["size"]
    assert twin.fields is not None
    fields = {
        member["name"]: (member["bits_offset"] // 8, size_of(types, member["type_id"]))
        for member in compiled["members"]
    }
    assert fields == {field: (offset, dtype.itemsize) for field, (dtype, offset, *_) in twin.fields.items()}


@pytest.mark.parametrize("name", sorted(TWINS))
def test_signs_agree(types: dict[int, dict[str, Any]], name: str) -> None:
    fields = TWINS[name].fields
    assert fields is not None
    for member in find_type(types, "STRUCT", name)["members"]:
        entry = resolve(types, member["type_id"])
        if entry["kind"] == "INT":
            assert (entry["encoding"] == "SIGNED") == (fields[member["name"]][0].kind == "i"), member["name"]


def test_every_map_has_the_value_size_that_the_engine_maps(types: dict[int, dict[str, Any]]) -> None:
    for name, dtype in layout.MAPS.items():
        definition = types[find_type(types, "VAR", name)["type_id"]]
        (value,) = (member for member in definition["members"] if member["name"] == "value")
        assert size_of(types, resolve(types, value["type_id"])["type_id"]) == dtype.itemsize, name


def test_config_is_packed_in_the_order_of_the_struct(types: dict[int, dict[str, Any]]) -> None:
    compiled = find_type(types, "STRUCT", "tb_config")
    packed = layout.pack_config(**CONFIG)
    assert len(packed) == compiled["size"]
    assert {member["name"] for member in compiled["members"]} == set(CONFIG)
    for member in compiled["members"]:
        (value,) = struct.unpack_from("=I", packed, member["bits_offset"] // 8)
        assert value == CONFIG[member["name"]], member["name"]


def test_read_only_sections_have_the_size_of_what_is_written(types: dict[int, dict[str, Any]]) -> None:
    for name, written in (("config", layout.pack_config(**CONFIG)), ("crc_table", layout.pack_crc_table())):
        assert size_of(types, find_type(types, "VAR", name)["type_id"]) == len(written), name


def test_qp_feedback_fields_are_neighbours() -> None:
    # The engine copies the three with one stride.
    fields = layout.QP.fields
    assert fields is not None
    first = fields["acked_packets"][1]
    assert [fields[name][1] for name in ("acked_packets", "naks_packets", "nak_position")] == [
        first,
        first + 8,
        first + 16,
    ]
    assert layout.QP.itemsize == 192  # three cache lines
