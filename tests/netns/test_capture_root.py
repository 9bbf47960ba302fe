"""Captures of running fabrics, as tshark reads them; how they end; what they leave behind: nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.utils import RawPcapNgReader

from testbed import api
from testbed.errors import LabError, TestbedError
from testbed.kernel.namespaces import NETNS_DIR
from testbed.roce.bth import build_pfc
from testbed.roce.icrc import carried_icrc, compute_icrc
from tests.conftest import list_test_labs, skip_or_fail
from tests.netns.labs import PATIENCE_S, wait_until
from tests.netns.test_cli_root import SMALL, A, command, deployed, ping, run_command, small

__all__ = ["small"]  # the fixture

pytestmark = pytest.mark.root

FIELDS = ("frame.interface_name", "frame.packet_flags_direction", "frame.len", "frame.cap_len", "frame.time_epoch")
BTH = ("infiniband.bth.opcode", "infiniband.bth.psn")
WRITES = {6, 7, 8, 10}
ACKNOWLEDGE = 17
HOST3 = "10.0.0.7"
INBOUND, OUTBOUND = "0x00000001", "0x00000002"


def dissect(file: Path, *fields: str, only: str = "") -> list[list[str]]:
    """Return fields of every frame as tshark decodes it, without any option that would help it."""
    if shutil.which("tshark") is None:
        skip_or_fail("tshark is not installed (apt install tshark)")
    arguments = ["tshark", "-r", str(file), "-T", "fields", *(part for field in fields for part in ("-e", field))]
    if only:
        arguments += ["-Y", only]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def capture_processes() -> set[int]:
    """Return the processes that capture in labs of this run of the tests."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                words = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue
            if b"testbed.kernel.capture_process" in words and any(name.encode() in words for name in (A, SMALL)):
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    assert not capture_processes()
    yield
    wait_until(lambda: not capture_processes(), "the capture's process ended")


@contextmanager
def capturing(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Capture in the background, from when the first frame would be seen."""
    with subprocess.Popen(
        command("capture", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "capturing at" in process.stderr.readline()
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err
    return out, err


def frames_in(file: Path) -> list[bytes]:
    with RawPcapNgReader(str(file)) as reader:
        return [data for data, _ in reader]


def test_captured_run_shows_every_frame_as_it_leaves_and_as_it_arrives(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.pcapng"
    result = api.run(api.load(small), pcap=file)
    assert any(f"4 ports were captured ({len(frames_in(file))} frames" in warning for warning in result.warnings)
    rows = dissect(file, *FIELDS, *BTH)
    assert {row[0] for row in rows} == {f"host{rank}/eth0" for rank in range(4)}
    opcodes = Counter((int(row[5]), row[1]) for row in rows)
    assert {opcode for opcode, _ in opcodes} <= WRITES | {ACKNOWLEDGE}
    for opcode, _ in opcodes:
        assert opcodes[opcode, INBOUND] == opcodes[opcode, OUTBOUND]
    # Four ranks send 2 (n - 1) / n of 256 KiB in each of two iterations, 4 KiB a frame.
    assert sum(opcodes[opcode, OUTBOUND] for opcode in WRITES) == 2 * 4 * 6 * 16
    sent, arrived = (Counter((row[5], row[6]) for row in rows if row[1] == way) for way in (OUTBOUND, INBOUND))
    assert sent == arrived
    assert max(int(row[3]) for row in rows) == 128
    assert max(int(row[2]) for row in rows) > 4096
    times = [float(row[4]) for row in rows]
    assert times == sorted(times)
    # Emulated time: two iterations of some 20 us, which were most of a second here.
    assert 20e-6 < times[-1] - times[0] < 200e-6
    assert list_test_labs() == []


def test_ports_of_switches_and_whole_frames_with_a_valid_icrc(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.pcapng"
    with deployed(small, A) as name:
        done = run_command(
            *("run", small, "--name", name, "--output", tmp_path / "out", "--pcap", file, "--snap-length", 0),
            *("--pcap-port", "leaf0/up0", "--pcap-port", "leaf0/up1", "--pcap-port", "spine1"),
        )
    assert done.returncode in (0, 4), done.stderr
    assert "# warning: 4 ports were captured" in done.stdout
    rows = dissect(file, *FIELDS, *BTH)
    names = {row[0] for row in rows}
    assert names == {"leaf0/up0", "leaf0/up1", "spine1/down0", "spine1/down1"}
    assert all(row[2] == row[3] for row in rows)
    frames = frames_in(file)
    assert len(frames) == len(rows)
    for frame in frames[:: max(1, len(frames) // 50)]:
        assert carried_icrc(frame) == compute_icrc(frame)
    crossed = Counter((row[0], row[1]) for row in rows)
    assert crossed["leaf0/up1", OUTBOUND] == crossed["spine1/down0", INBOUND] > 0


def test_pfc_and_vlan_frames_are_decoded(small: Path, tmp_path: Path) -> None:
    own = tmp_path / "frames.py"
    own.write_text(
        "from scapy.layers.inet import ICMP, IP\nfrom scapy.layers.l2 import Dot1Q, Ether\n"
        f"def frames(nic):\n  yield bytes.fromhex('{build_pfc('02:00:00:01:00:00', {3: 0xFFFF}).hex()}')\n"
        "  yield Ether() / Dot1Q(vlan=5, prio=3) / IP(dst='10.0.0.3') / ICMP()\n"
    )
    file = tmp_path / "pfc.pcapng"
    with deployed(small, A) as name, capturing(name, "leaf0/down0", "-o", file, "--count", 2) as process:
        assert run_command("inject", "host0", own, "--lab", name, "--timeout", 0).returncode == 0
        out, err = finish(process)
    assert process.returncode == 0, err
    assert out.split()[-3:] == ["leaf0/down0", "2", "0"]
    rows = dissect(file, "eth.type", "macc.opcode", "vlan.id", "_ws.malformed")
    assert rows[0][:2] == ["0x8808", "0x0101"]
    assert rows[1][2] == "5"
    assert not any(row[3] for row in rows)


def test_ctrl_c_ends_a_capture_in_order(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.pcapng"
    with deployed(small, A) as name, capturing(name, "host0", "host3/eth0", "-o", file) as process:
        ping(name, HOST3, 3)
        process.send_signal(signal.SIGINT)
        out, err = finish(process)
        assert process.returncode == 0, err
        assert [line.split() for line in out.splitlines()] == [
            ["port", "frames", "lost"],
            ["host0/eth0", "6", "0"],
            ["host3/eth0", "6", "0"],
        ]
    assert [row[0] for row in dissect(file, "_ws.col.Protocol")] == ["ICMP"] * 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_capture_leaves_a_complete_file_and_no_process(
    small: Path, tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "a.pcapng"
    with deployed(small, A) as name:
        with capturing(name, "host0", "-o", file) as process:
            ping(name, HOST3)
            process.send_signal(number)
            finish(process)
            assert process.returncode == (143 if number == signal.SIGTERM else -9)
        wait_until(lambda: not capture_processes(), "the capture's process ended")
        assert len(dissect(file, "frame.number")) == 2


def test_capture_ends_with_its_lab_and_does_not_keep_it(small: Path, tmp_path: Path) -> None:
    with deployed(small, A) as name, capturing(name, "-o", tmp_path / "a.pcapng") as process:
        namespace = os.stat(NETNS_DIR / f"{A}-host0").st_ino
        api.destroy(name)
        out, err = finish(process)
        assert process.returncode == 0, err
        assert len(out.splitlines()) == 5
        assert not any(Path(entry).stat().st_ino == namespace for entry in NETNS_DIR.iterdir())


def test_capture_ends_after_its_time_and_streams_to_stdout(small: Path) -> None:
    with deployed(small, A) as name:
        begin = time.monotonic()
        done = subprocess.run(
            command("capture", name, "host0", "-o", "-", "--duration", 0.2, "--wall-time"),
            capture_output=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert 0.2 <= time.monotonic() - begin < PATIENCE_S / 2
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x0a\x0d\x0d\x0a")
    assert b"host0/eth0       0     0" in done.stderr
    assert b"this machine's" in done.stdout


def test_reader_that_goes_ends_the_capture_with_an_error(small: Path) -> None:
    with deployed(small, A) as name:
        pipe = subprocess.Popen(
            command("capture", name, "host0", "-o", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with pipe:
            assert pipe.stdout is not None
            assert pipe.stderr is not None
            pipe.stderr.readline()
            pipe.stdout.close()
            ping(name, HOST3)
            said = pipe.stderr.read().decode()
            assert pipe.wait(PATIENCE_S) == 1
    assert "error: the capture ended early: Broken pipe" in said
    assert "Traceback" not in said


def test_full_disk_spoils_the_capture_but_not_the_run(small: Path) -> None:
    result = api.run(api.load(small), pcap=Path("/dev/full"))
    assert any("the capture ended early: No space left on device" in warning for warning in result.warnings)
    assert result.results[0].cct_ns


def test_mistakes_are_told_before_anything_is_built(small: Path, tmp_path: Path) -> None:
    scenario = api.load(small)
    with pytest.raises(LabError, match="no port 'leaf0/nosuch'"):
        api.run(scenario, pcap=tmp_path / "a.pcapng", pcap_ports=["leaf0/nosuch"])
    with pytest.raises(TestbedError, match="cannot be written: No such file or directory"):
        api.run(scenario, pcap=tmp_path / "none" / "a.pcapng")
    with pytest.raises(LabError, match="no lab named"):
        api.capture(A, [], tmp_path / "a.pcapng")
    assert run_command("run", small, "--pcap-port", "leaf0").returncode == 2
    assert not list(tmp_path.glob("*.pcapng"))
    assert list_test_labs() == []


def test_signal_during_a_captured_run_leaves_a_readable_file(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.pcapng"
    arguments = command("run", small, "--iters", 50, "--output", tmp_path / "out", "--pcap", file)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "iteration 2/" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 143
    assert "Traceback" not in rest
    assert not capture_processes()
    assert list_test_labs() == []
    assert len(dissect(file, "frame.number")) > 100


def test_capture_process_keeps_off_the_engines_cpu(small: Path, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: there is no other")
    with deployed(small, A) as name, capturing(name, "host0", "-o", tmp_path / "a.pcapng"):
        (process,) = capture_processes()
        assert os.sched_getaffinity(process) == os.sched_getaffinity(0) - {max(os.sched_getaffinity(0))}


def test_counted_capture_has_exactly_so_many_frames(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.pcapng"
    with deployed(small, A) as name:
        with capturing(name, "leaf0", "spine0", "spine1", "-o", file, "--count", 5) as process:
            ping(name, HOST3, 4)
            finish(process)
        assert process.returncode == 0
        assert {way.drops_packets for link in api.inspect(name).links for way in link.directions} == {0}
    assert len(frames_in(file)) == 5
