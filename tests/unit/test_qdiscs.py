"""Requests about qdiscs, byte for byte as a C program that includes the kernel's headers writes them."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.kernel import tc
from testbed.kernel.delay_netem import pack_netem
from testbed.kernel.gate_plug import PlugGate, pack_plug
from testbed.kernel.gate_tbf import TbfGate
from testbed.kernel.layout import pack_data_classes
from testbed.kernel.netlink import NLA_F_NESTED, NLM_F_CREATE, RTM_NEWQDISC, RTM_NEWTCLASS, Message
from testbed.kernel.queues import Egress, Thresholds, create_egress
from testbed.kernel.red import pack_red, spacing_probability
from testbed.kernel.scheduler_ets import pack_ets
from testbed.kernel.scheduler_prio import pack_prio

EGRESS = Egress(7, "up0", 10**6, 40_000, 4300, 24, [(3, 1)], 3)
PROGRAM = """
#include <linux/pkt_sched.h>
#include <linux/netlink.h>
#include <stdio.h>
#define SHOW(name, value) do { printf(name); for (unsigned i = 0; i < sizeof(value); i++) \\
    printf("%02x", ((unsigned char *)&value)[i]); printf("\\n"); } while (0)
int main(void) {
    struct tc_plug_qopt block = {TCQ_PLUG_BUFFER, 9000}, open = {TCQ_PLUG_RELEASE_INDEFINITE, 0};
    struct tc_red_qopt red = {0x7fffffff, 100, 400, 0, 0, 0, 0};
    struct nla_bitfield32 flags = {TC_RED_ECN | TC_RED_NODROP, TC_RED_ECN | TC_RED_NODROP};
    struct tc_htb_glob glob = {3, 10, 4, 0, 0};
    struct tc_ratespec rate = {0}, ceil = {0};
    struct tc_htb_opt htb = {0};
    int numbers[] = {TCA_RED_PARMS, TCA_RED_STAB, TCA_RED_MAX_P, TCA_RED_FLAGS, TCA_HTB_PARMS, TCA_HTB_INIT, TCA_HTB_RATE64,
                     TCA_HTB_CEIL64};
    struct tc_prio_qopt prio = {3, {2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2}};
    int ets[] = {TCA_ETS_NBANDS, TCA_ETS_NSTRICT, TCA_ETS_QUANTA, TCA_ETS_QUANTA_BAND, TCA_ETS_PRIOMAP, TCA_ETS_PRIOMAP_BAND};
    int netem_latency = TCA_NETEM_LATENCY64;
    struct tc_netem_qopt netem = {0, 0x7fffffff, 0, 0, 0, 0};
    rate.linklayer = ceil.linklayer = TC_LINKLAYER_ETHERNET;
    rate.overhead = ceil.overhead = 24;
    rate.rate = 500000; ceil.rate = 1000000;
    htb.rate = rate; htb.ceil = ceil;
    htb.buffer = 1250000; htb.cbuffer = 625000; htb.quantum = 4300; htb.prio = 2;
    SHOW("block ", block); SHOW("open ", open); SHOW("red ", red); SHOW("flags ", flags); SHOW("glob ", glob); SHOW("htb ", htb);
    SHOW("numbers ", numbers); SHOW("ets ", ets); SHOW("prio ", prio);
    SHOW("netem ", netem); SHOW("netem_latency ", netem_latency);
    return 0;
}
"""


@functools.cache
def compiled() -> dict[str, bytes]:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler is installed (apt install clang libc6-dev)")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "headers"
        command = [compiler, "-x", "c", "-", "-o", str(program)]
        build = subprocess.run(command, input=PROGRAM, capture_output=True, text=True, check=False)
        if build.returncode:
            pytest.skip(f"the kernel's headers do not compile here: {build.stderr.splitlines()[:1]}")
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    return {name: bytes.fromhex(value) for name, value in (line.split() for line in lines if line)}


def attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        size, kind = struct.unpack_from("=HH", data)
        found[kind & ~NLA_F_NESTED] = data[4:size]
        data = data[(size + 3) & ~3 :]
    return found


def pieces(data: bytes, kind: int) -> list[bytes]:
    """Return the values of attributes that are all of one kind."""
    found = []
    while data:
        size, one = struct.unpack_from("=HH", data)
        assert one == kind
        found.append(data[4:size])
        data = data[(size + 3) & ~3 :]
    return found


def options_of(message: Message) -> bytes:
    return attributes(message.payload[20:])[2]


def kind_of(message: Message) -> str:
    return attributes(message.payload[20:])[1].rstrip(b"\0").decode()


def place_of(message: Message) -> tuple[int, int]:
    """Return handle and parent."""
    handle, parent = struct.unpack_from("=II", message.payload, 8)
    return handle, parent


def test_plug_says_what_the_header_does() -> None:
    c = compiled()
    assert pack_plug(0, 9000) == c["block"]
    assert pack_plug(2, 0) == c["open"]


def test_red_says_what_the_header_does() -> None:
    c = compiled()
    parms, stab, max_p, flags, *_ = struct.unpack("=8i", c["numbers"])
    found = attributes(pack_red(100, 400, 0.2))
    assert found[parms] == c["red"]
    assert found[flags] == c["flags"]
    assert found[stab] == bytes([31]) * 256
    assert struct.unpack("=I", found[max_p])[0] == round((1 << 32) * spacing_probability(0.2))


def test_htb_says_what_the_header_does() -> None:
    c = compiled()
    *_, parms, init, rate64, ceil64 = struct.unpack("=8i", c["numbers"])
    assert attributes(options_of(tc.create_htb(7, "up0", 0x10001, 0x100000, 0x100004))) == {init: c["glob"]}
    one = tc.create_htb_class(
        7,
        "up0",
        0x100001,
        tc.class_of(0),
        rate_bytes_per_s=500_000,
        ceil_bytes_per_s=1_000_000,
        burst_bytes=40_000,
        quantum_bytes=4300,
        overhead_bytes=24,
        rank=2,
    )
    assert one.kind == RTM_NEWTCLASS
    found = attributes(options_of(one))
    assert found[parms] == c["htb"]
    assert struct.unpack("=Q", found[rate64]) == (500_000,)
    assert struct.unpack("=Q", found[ceil64]) == (1_000_000,)


def test_marks_are_as_many_as_asked_for() -> None:
    """RED's distances, drawn as the kernel draws them, give the share that `spacing_probability` was asked for."""
    for share in (0.01, 0.2, 0.5):
        p = spacing_probability(share)
        # Distance n with probability p for every n up to 1/p: the mean of ceil(U/p).
        draws = 100_000
        distances = sum(-(-((number + 0.5) / draws) // p) for number in range(draws)) / draws
        assert 1 / distances == pytest.approx(share, rel=0.05)


def chain(egress: Egress) -> list[tuple[str, str, str]]:
    return [
        (kind_of(one), *(tc.handle_text(place) if place != tc.TC_H_ROOT else "root" for place in place_of(one)))
        for one in create_egress(egress)
        if one.flags & NLM_F_CREATE
    ]


def test_one_priority_needs_a_shaper_alone() -> None:
    assert chain(EGRESS) == [("mq", "1:", "root"), ("tbf", "10:", "1:1"), ("pfifo", "20:", "1:2")]
    assert chain(replace(EGRESS, gate="tbf")) == chain(EGRESS)


def test_plug_and_red_hang_below_the_shaper() -> None:
    egress = replace(EGRESS, gate="plug", marking=Thresholds(100, 400, 0.2))
    assert chain(egress)[1:-1] == [("tbf", "10:", "1:1"), ("red", "43:", "10:1"), ("plug", "53:", "43:1")]
    # A fresh plug is closed: the last request about it opens it.
    *_, opened, _ = create_egress(egress)
    assert opened.kind == RTM_NEWQDISC
    assert options_of(opened) == compiled()["open"]


def test_several_priorities_have_a_class_each_and_a_gate_below() -> None:
    egress = replace(EGRESS, weights=[(3, 2), (0, 1)], rest=0, gate="tbf")
    assert chain(egress)[1:-1] == [
        ("htb", "10:", "1:1"),
        ("htb", "10:10", "10:"),
        ("htb", "10:1", "10:10"),
        ("htb", "10:2", "10:10"),
        ("tbf", "33:", "10:1"),
        ("tbf", "30:", "10:2"),
    ]
    plugs = [one[0] for one in chain(replace(egress, gate="plug"))]
    assert plugs.count("plug") == 2
    assert "tbf" not in plugs  # the classes make the rate


def test_gates_change_what_was_hung() -> None:
    for weights in ([(3, 1)], [(3, 2), (0, 1)], [(0, None), (3, 2)]):
        for gate in (TbfGate(), PlugGate()):
            egress = replace(EGRESS, weights=weights, gate=gate.name)
            made = {place_of(one)[0] for one in create_egress(egress)}
            for message in (gate.close(egress.queue(3)), gate.open(egress.queue(3))):
                assert place_of(message)[0] in made


def test_classes_are_those_of_the_program() -> None:
    header = Path("testbed/bpf/fabric.h").read_text()
    assert f"#define TB_DATA_HANDLE {tc.DATA_HANDLE:#x}\n" in header
    egress = replace(EGRESS, weights=[(4, None), (3, 2), (0, 1)], rest=0)
    packed = pack_data_classes([4, 3, 0], 0)
    for priority in range(8):
        expected = egress.class_of(priority if priority in (4, 3, 0) else egress.rest)
        assert tc.DATA_HANDLE + (packed >> 4 * priority & 15) == expected


def parameters_of_classes(egress: Egress) -> dict[str, tuple[int, int, int]]:
    """Return the guaranteed rate, the quantum and the prio of each class of a port's HTB."""
    *_, rate64, _ = struct.unpack("=8i", compiled()["numbers"])
    found = {}
    for one in create_egress(egress):
        if one.kind == RTM_NEWTCLASS:
            options = attributes(options_of(one))
            *_, quantum, _, prio = struct.unpack("=11I", options[1])
            found[tc.handle_text(place_of(one)[0])] = struct.unpack("=Q", options[rate64])[0], quantum, prio
    return found


def test_strict_classes_of_an_htb_borrow_first_and_nothing_is_guaranteed_beside_them() -> None:
    """HTB serves what is below its guaranteed rate first, whatever its prio: a weight's share would go before a strict class."""
    weighted = parameters_of_classes(replace(EGRESS, weights=[(4, 3), (3, 1)]))
    assert weighted == {"10:10": (10**6, 4300, 0), "10:1": (750_000, 12_900, 0), "10:2": (250_000, 4300, 0)}
    strict = parameters_of_classes(replace(EGRESS, weights=[(5, None), (1, None), (4, 3), (3, 1)]))
    assert strict.pop("10:10") == (10**6, 4300, 0)
    assert strict == {
        "10:1": (1, 4300, 0),
        "10:2": (1, 4300, 1),
        "10:3": (1, 12_900, 2),
        "10:4": (1, 4300, 2),
    }


def test_ets_says_what_the_header_does_and_hangs_below_one_shaper() -> None:
    c = compiled()
    nbands, nstrict, quanta, quanta_band, priomap, priomap_band = struct.unpack("=6i", c["ets"])
    found = attributes(pack_ets(2, [4300, 8600], 1))
    assert (found[nbands], found[nstrict]) == (b"\4", b"\2")
    assert pieces(found[quanta], quanta_band) == [struct.pack("=I", one) for one in (4300, 8600)]
    assert pieces(found[priomap], priomap_band) == [b"\1"] * 16
    # An empty list of quanta is no list.
    assert quanta not in attributes(pack_ets(2, [], 1))


def test_prio_says_what_the_header_does() -> None:
    assert pack_prio(3, 2) == compiled()["prio"]


@pytest.mark.parametrize("scheduler", ["ets", "prio"])
def test_bands_hang_below_one_shaper(scheduler: str) -> None:
    made = chain(replace(EGRESS, weights=[(3, None), (0, None)], rest=0, scheduler=scheduler))
    assert made[1:3] == [("tbf", "30:", "1:1"), (scheduler, "10:", "30:1")]
    # Every band has a queue that never drops.
    assert sorted(parent for kind, _, parent in made if kind == "pfifo") == ["10:1", "10:2", "1:2"]
    assert len({handle for _, handle, _ in made}) == len(made)


def test_netem_says_what_the_header_does_and_hangs_below_the_shaper() -> None:
    c = compiled()
    (latency,) = struct.unpack("=i", c["netem_latency"])
    options = pack_netem(2_400_000)
    assert options[: len(c["netem"])] == c["netem"]
    assert attributes(options[len(c["netem"]) :]) == {latency: struct.pack("=q", 2_400_000)}
    egress = replace(EGRESS, gate="plug", marking=Thresholds(100, 400, 0.2), wall_delay_ns=2_400_000)
    below = [("tbf", "10:", "1:1"), ("netem", "63:", "10:1"), ("red", "43:", "63:1"), ("plug", "53:", "43:1")]
    assert chain(egress)[1:] == [*below, ("netem", "20:", "1:2")]


@pytest.mark.parametrize("scheduler", ["htb", "ets", "prio"])
def test_every_frame_of_a_delayed_port_is_delayed_once(scheduler: str) -> None:
    made = chain(replace(EGRESS, weights=[(3, None), (0, None)], scheduler=scheduler, wall_delay_ns=1000))
    parents = {handle: parent for _, handle, parent in made}
    delays = {handle for kind, handle, _ in made if kind == "netem"}

    def ancestors(handle: str) -> list[str]:
        found = [handle]
        while (parent := parents.get(found[-1], "root")) != "root":
            # A class that is no qdisc of its own belongs to the qdisc of its major number.
            found.append(parent if parent in parents else parent.split(":")[0] + ":")
        return found

    leaves = set(parents) - {one for handle in parents for one in ancestors(handle)[1:]}
    assert leaves
    for leaf in leaves:
        assert len(delays & set(ancestors(leaf))) == 1, (leaf, ancestors(leaf))
