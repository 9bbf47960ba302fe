"""Tries what a run needs on this machine, each thing by doing it: no kernel version is compared.

What needs a namespace is tried in a child process, in network and mount namespaces of its own that end with it; nothing is left
behind and nothing outside them is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from testbed.errors import KernelError, MachineError
from testbed.kernel import bpf, layout, links, rps, scheduling, tc
from testbed.kernel.netlink import (
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_NEWQDISC,
    Message,
    RouteSocket,
    attribute,
    attribute_text,
)

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE, _MS_BIND = 0x4000, 1 << 18, 0x1000
_MCL_CURRENT = 1
_IFNAMES = ("probe0", "probe1")
_INDICES = (2, 3)
_TCA_OPTIONS = 2
_PACKAGES = "apt-get install"
# Debian's kernels have every module but in their cloud variety; Ubuntu keeps the rarer ones in a package.
_MODULES = "in Ubuntu's linux-modules-extra-$(uname -r), in Debian's linux-image-amd64"


class Status(StrEnum):
    """What became of one thing that was tried."""

    OK = "ok"
    WARNING = "warning"
    OPTIONAL_MISSING = "optional-missing"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried.

    Attributes:
        name: What.
        status: How it went; ``missing`` alone stops runs.
        meaning: What that means for runs.
        mend: The command or act that mends it, or ``""``.
    """

    name: str
    status: Status
    meaning: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class _Qdisc:
    """A qdisc, the options that a minimal one takes, and what it is for."""

    kind: str
    options: bytes | None
    meaning: str


def _nested(kind: int, value: bytes) -> bytes:
    return attribute(kind, value)


# Source: include/uapi/linux/pkt_sched.h (the structs of each qdisc's options).
_OPTIONAL_QDISCS = (
    _Qdisc("plug", None, "a gate for pauses that needs no shaper"),
    _Qdisc(
        "red",
        _nested(1, struct.pack("=IIIBBBB", 1 << 20, 1 << 16, 1 << 17, 9, 9, 9, 0)) + _nested(2, bytes(256)),
        "ECN marks by the kernel, to compare with those of the eBPF program",
    ),
    _Qdisc("netem", struct.pack("=IIIIII", 0, 1000, 0, 0, 0, 0), "link delay for real applications and soft-RoCE"),
    _Qdisc("htb", _nested(2, struct.pack("=IIIII", 3, 10, 0, 0, 0)), "several data priorities on one port"),
    _Qdisc("prio", struct.pack("=i16B", 3, *([1] * 16)), "strict priorities on one port"),
    _Qdisc("ets", _nested(1, struct.pack("=B", 2)), "strict and weighted priorities on one port"),
)

_TOOLS = (
    ("ip", "iproute2", "look at labs with `ip netns`"),
    ("tc", "iproute2", "look at their qdiscs"),
    ("tshark", "tshark", "captures decoded by Wireshark, also in the tests"),
    ("ping", "iputils-ping", "try a lab by hand"),
    ("clang", "clang libbpf-dev", "compile the eBPF programs after a change; the package ships them compiled"),
)


def probe_machine() -> tuple[Finding, ...]:
    """Try everything and return what was found, in the order in which things depend on each other."""
    if os.geteuid() != 0:
        return (
            Finding(
                "root",
                Status.MISSING,
                "labs cannot be built, nor most things tried",
                "run as root: sudo testbed doctor",
            ),
            _probe_cpus(),
            _probe_quota(),
            *_probe_tools(),
        )
    return (
        Finding("root", Status.OK, "may administer the network"),
        *_probe_in_child(),
        *_probe_scheduling_in_child(),
        _probe_cpus(),
        _probe_quota(),
        _probe_btf(),
        _probe_rxe(),
        *_probe_tools(),
    )


def probe_capacity(packets_per_s: float | None) -> Finding:
    """Return what is known of this machine's capacity.

    Args:
        packets_per_s: The cached measurement, or None.
    """
    if packets_per_s is None:
        return Finding(
            "capacity",
            Status.WARNING,
            "not measured yet: the first run with `time_dilation: auto` does, in a few seconds",
            "testbed run scenarios/star.yaml",
        )
    return Finding("capacity", Status.OK, f"carries {packets_per_s:,.0f} packets/s over four hops (cached)")


def probe_qdisc(kind: str) -> bool:
    """Return whether this kernel has an optional qdisc, by making one in a namespace that ends with a child process."""
    return any(found.name == f"qdisc {kind}" and found.status is Status.OK for found in _in_child(_probe_qdiscs, kind))


def _probe_qdiscs() -> list[Finding]:
    """Try the optional qdiscs alone; the calling process is lost to it."""
    _enter_namespaces()
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    index, ifname = _INDICES[0], _IFNAMES[0]
    found = []
    with RouteSocket() as route:
        _create_veth(route, descriptor)
        route.request([tc.create_mq(index, ifname)])
        for qdisc in _OPTIONAL_QDISCS:
            with contextlib.suppress(KernelError):
                route.request([_qdisc_message(index, ifname, tc.ROOT_HANDLE + 1, qdisc)])
                found.append(Finding(f"qdisc {qdisc.kind}", Status.OK, ""))
    return found


def _in_child(work: Callable[[], Sequence[Finding]], name: str) -> list[Finding]:
    """Do ``work`` in a child process and return its findings; a child that dies is one finding."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            found = json.dumps([asdict(finding) for finding in work()]).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(found)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        return [Finding(name, Status.MISSING, "the process that tried it died", "dmesg | tail")]
    return [Finding(**{**fields, "status": Status(fields["status"])}) for fields in json.loads(text)]


def _must(result: int, operation: str) -> None:
    if result < 0:
        raise KernelError(operation, ctypes.get_errno())


def _probe_in_child() -> list[Finding]:
    return _in_child(_probe_namespace, "network namespaces")


def _probe_namespace() -> list[Finding]:
    """Try namespaces, links, qdiscs and programs; the calling process is lost to it."""
    container = "run in a privileged container: docker run --privileged …"
    found: list[Finding] = []

    def attempt(
        name: str, work: Callable[[], None], meaning: str, mend: str, *, absent: Status = Status.MISSING
    ) -> bool:
        try:
            work()
        except MachineError as error:
            found.append(Finding(name, absent, f"{meaning}; {error.message}", error.hint or mend))
            return False
        except KernelError as error:  # its hint is to run doctor
            found.append(Finding(name, absent, f"{meaning}; {error.message}", mend))
            return False
        except OSError as error:
            found.append(Finding(name, absent, f"{meaning}; {error.strerror}", mend))
            return False
        found.append(Finding(name, Status.OK, meaning))
        return True

    if not attempt("network namespaces", _enter_namespaces, "one per host and switch", container):
        return found
    attempt("named namespaces", _mount_namespace, "`ip netns exec` and `testbed exec` find them", container)
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with RouteSocket() as route:
        if not attempt(
            "veth",
            lambda: _create_veth(route, descriptor),
            "links with two transmit queues",
            f"modprobe veth ({_MODULES})",
        ):
            return found
        index, ifname = _INDICES[0], _IFNAMES[0]
        module = "modprobe sch_{0} (" + f"{_MODULES}), or `testbed vm run`"
        parent = tc.ROOT_HANDLE + 1
        tbf = tc.create_tbf(
            index, ifname, parent, tc.DATA_HANDLE, rate_bytes_per_s=10**6, burst_bytes=1 << 16, overhead_bytes=24
        )
        pfifo = tc.create_pfifo(index, ifname, tc.ROOT_HANDLE + 2, tc.CONTROL_HANDLE, 100)
        for name, message, meaning in (
            ("qdisc mq", tc.create_mq(index, ifname), "a queue for data and one for control"),
            ("qdisc tbf", tbf, "link rates"),
            ("qdisc pfifo", pfifo, "the control queue"),
            ("qdisc clsact", tc.create_clsact(_INDICES[1], _IFNAMES[1]), "hooks for the eBPF programs"),
        ):
            attempt(name, _requesting(route, message), meaning, module.format(name.split()[1]))
        for qdisc in _OPTIONAL_QDISCS:
            attempt(
                f"qdisc {qdisc.kind}",
                _requesting(route, _qdisc_message(index, ifname, parent, qdisc)),
                f"optional: {qdisc.meaning}",
                module.format(qdisc.kind),
                absent=Status.OPTIONAL_MISSING,
            )
        attempt("eBPF", lambda: _load_programs(route), "forwarding, queue accounting and NICs", "scripts/build-bpf")
    attempt(
        "packet steering",
        lambda: _steer(descriptor),
        "every port is served by one CPU, so frames stay in order",
        container,
    )
    return found


def _requesting(route: RouteSocket, message: Message) -> Callable[[], None]:
    return lambda: route.request([message])


def _enter_namespaces() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _must(libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS), "unshare --net --mount")
    _must(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount --make-rprivate /")


def _mount_namespace() -> None:
    """Bind the namespace to a file, as ``ip netns add`` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.NamedTemporaryFile() as file:
        source = b"/proc/self/ns/net"
        result = libc.mount(source, file.name.encode(), b"none", ctypes.c_ulong(_MS_BIND), None)
        _must(result, f"mount --bind /proc/self/ns/net {file.name}")
        _must(libc.umount2(file.name.encode(), 0), f"umount {file.name}")


def _create_veth(route: RouteSocket, descriptor: int) -> None:
    names, indices = _IFNAMES, _INDICES
    pair = links.create_veth(
        ifname=names[0],
        index=indices[0],
        mac="02:00:00:00:00:01",
        mtu=4200,
        peer_ifname=names[1],
        peer_index=indices[1],
        peer_mac="02:00:00:00:00:02",
        peer_netns_fd=descriptor,
    )
    route.request([pair, *(links.set_link_up(index, name) for index, name in zip(indices, names, strict=True))])


def _qdisc_message(index: int, ifname: str, parent: int, qdisc: _Qdisc) -> Message:
    payload = struct.pack("=BxHiIII", 0, 0, index, 0, parent, 0) + attribute_text(1, qdisc.kind)
    if qdisc.options is not None:
        payload += attribute(_TCA_OPTIONS | NLA_F_NESTED, qdisc.options)
    operation = f"tc qdisc replace dev {ifname} parent {tc.handle_text(parent)} {qdisc.kind}"
    return Message(operation, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)


def _load_programs(route: RouteSocket) -> None:
    """Load the object as a small fabric would, map its arrays and attach each program."""
    entries = dict.fromkeys(layout.MAPS, layout.PRIORITIES)
    loaded = bpf.load_object(map_entries=entries, initial_values={}, programs=layout.FABRIC_PROGRAMS)
    index, ifname = _INDICES[1], _IFNAMES[1]
    try:
        layout.MappedArrays(loaded.maps, entries)
        for name, program in loaded.programs.items():
            hook = tc.TC_H_EGRESS_HOOK if name == "host_egress" else tc.TC_H_INGRESS_HOOK
            request = tc.attach_filter(index, ifname, hook, program, name)
            # Replace: the two ingress programs share a place.
            route.request([dataclasses.replace(request, flags=NLM_F_CREATE | NLM_F_REPLACE)])
    finally:
        loaded.close()


def _steer(descriptor: int) -> None:
    cpu = scheduling.available_cpus()[0]
    if rps.has_default_mask():
        (Path("/proc/sys") / rps.SYSCTL).write_text(rps.cpu_mask(cpu))
    else:
        rps.steer_ports(descriptor, [_IFNAMES[1]], cpu)


def _probe_scheduling_in_child() -> list[Finding]:
    return _in_child(_probe_scheduling, "SCHED_FIFO")


def _probe_scheduling() -> list[Finding]:
    """Try what the engine asks of the scheduler; the calling process is lost to it."""
    mend = "docker run --cap-add SYS_NICE --cap-add IPC_LOCK --ulimit rtprio=99, or run on the host"
    fifo = Finding("SCHED_FIFO", Status.OK, "ticks come on time beside ordinary work")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(scheduling.ENGINE_FIFO_PRIORITY))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError as error:
        meaning = f"refused ({error.strerror}): other work delays ticks, and the verdict will say so"
        fifo = Finding("SCHED_FIFO", Status.WARNING, meaning, mend)
    locked = Finding("mlockall", Status.OK, "no page fault delays a tick")
    if ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT) != 0:
        meaning = f"refused ({os.strerror(ctypes.get_errno())}): page faults may delay ticks"
        locked = Finding("mlockall", Status.WARNING, meaning, mend)
    return [fifo, locked]


def _probe_cpus() -> Finding:
    cpus = len(scheduling.available_cpus())
    if cpus == 1:
        return Finding(
            "CPUs", Status.WARNING, "1: engine and fabric disturb each other", "give the machine two CPUs or more"
        )
    return Finding("CPUs", Status.OK, f"{cpus}: one for the engine, {cpus - 1} for the fabric's ports")


def _probe_quota() -> Finding:
    cpus = read_cpu_quota()
    if cpus is None:
        return Finding("CPU quota", Status.OK, "none")
    status = Status.OK if cpus >= len(scheduling.available_cpus()) else Status.WARNING
    meaning = f"{cpus:g} CPUs' time"
    if status is Status.OK:
        return Finding("CPU quota", status, meaning)
    return Finding(
        "CPU quota",
        status,
        f"{meaning}: runs stand still when it is used up",
        "docker run without --cpus, or with more",
    )


def read_cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPUs' worth of time that control groups grant this process; None where there is no limit.

    Args:
        root: Where control groups are mounted.
        membership: The process's own groups, ``hierarchy:controllers:path`` a line.
    """
    quotas: list[float] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            bases, unified = [root, root / "unified"], True
        elif "cpu" in controllers.split(","):
            bases, unified = [root / controllers, root / "cpu"], False
        else:
            continue
        for base in bases:
            folder = base / path.lstrip("/")
            while True:  # a limit on any group above counts; inside a container the path may lie outside the mount
                quota = _read_quota(folder, unified=unified)
                if quota is not None:
                    quotas.append(quota)
                if folder == base or base not in folder.parents:
                    break
                folder = folder.parent
    return min(quotas, default=None)


def _read_quota(folder: Path, *, unified: bool) -> float | None:
    try:
        if unified:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _probe_btf() -> Finding:
    if Path("/sys/kernel/btf/vmlinux").exists():
        return Finding("BTF", Status.OK, "the kernel describes its types")
    return Finding(
        "BTF",
        Status.OPTIONAL_MISSING,
        "bpftool shows maps without field names",
        "a kernel with CONFIG_DEBUG_INFO_BTF=y",
    )


def _probe_rxe() -> Finding:
    meaning = "optional: soft-RoCE, the kernel's own RDMA over the fabric"
    if Path("/sys/module/rdma_rxe").exists():
        return Finding("rdma_rxe", Status.OK, f"{meaning} (loaded)")
    modprobe = shutil.which("modprobe")
    # A dry run: loading a module would change the host.
    if (
        modprobe
        and subprocess.run([modprobe, "-n", "-q", "rdma_rxe"], check=False, capture_output=True).returncode == 0
    ):
        return Finding("rdma_rxe", Status.OK, f"{meaning} (modprobe would load it)")
    return Finding("rdma_rxe", Status.OPTIONAL_MISSING, meaning, f"modprobe rdma_rxe ({_MODULES}), or `testbed vm run`")


def _probe_tools() -> list[Finding]:
    found = []
    for program, package, meaning in _TOOLS:
        present = shutil.which(program) is not None
        status = Status.OK if present else Status.OPTIONAL_MISSING
        found.append(Finding(program, status, f"optional: {meaning}", "" if present else f"{_PACKAGES} {package}"))
    return found
