"""Runs programs as they are on the hosts of a fabric: begun in order, watched, and ended with all that they have started.

The fabric's own tick goes on meanwhile: pauses are obeyed and the machine is judged as under any carrier.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from testbed.carriers.flow_control import flow_control
from testbed.carriers.placeholders import NicNames, Places, render_rsh
from testbed.carriers.protocol import ApplicationSamples, CommandSample, ProgressListener
from testbed.carriers.ticks import FabricTicks
from testbed.engine.data_queues import DataQueues
from testbed.engine.flow_control import FlowControl, NoFlowControl
from testbed.errors import RunError, TestbedError
from testbed.fabric import Fabric
from testbed.fabric.signals import signals_held
from testbed.kernel.host_tuning import tuned_host
from testbed.kernel.namespaces import open_namespace
from testbed.kernel.probe_link import ProbeLink
from testbed.kernel.processes import end_programs, read_is_listening, start_program
from testbed.kernel.rxe import find_gid, load_connection_manager
from testbed.kernel.scheduling import MonotonicClock, available_cpus, choose_cpus, engine_thread
from testbed.measure.samples import MachineSamples
from testbed.roce.wire import data_tos
from testbed.scenario import ApplicationWorkload, Carrier, Command, CommandMode, LinkDelay

FOLDER = "applications"
"""Below the results folder: what programs wrote, a folder for each application."""

_READY_LOOK_TICKS = 16
# Of what a program wrote: for its figures and for a message; at a look whether it is ready.
_READ_BYTES = 16 << 20
_READY_BYTES = 64 << 10
# Frames that do not move for so long were lost by the machine; what still moves after so long is not ours.
_STUCK_S, _SETTLE_S = 1.0, 30.0
_REST_LOOKS = 3
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SHOWN_LINES, _SHOWN_CHARACTERS = 12, 300
_SETUP_LOOK_S = 0.005


class OutputTail:
    """Looks for something in what a program writes, each part of it once: a tick has no time for more."""

    def __init__(self) -> None:
        self._offset_bytes = 0
        self._before = b""
        self._found = False

    def search(self, pattern: str, file: Path) -> bool:
        """Return whether a match has been written, as far as this look and those before have come.

        A match of several lines is found where it is not longer than a look.
        """
        if self._found:
            return True
        with contextlib.suppress(OSError), file.open("rb") as opened:
            opened.seek(self._offset_bytes)
            new = opened.read(_READY_BYTES)
            if new:
                self._offset_bytes += len(new)
                text = self._before + new
                self._found = re.search(pattern, text.decode(errors="replace"), re.MULTILINE) is not None
                self._before = text[-_READY_BYTES:]
                if len(text) > _READY_BYTES:  # `^` is the begin of a line, not of a look
                    self._before = self._before[self._before.find(b"\n") + 1 :]
        return self._found


@dataclass(eq=False)
class _Running:
    """One command that was begun."""

    number: int
    command: Command
    line: str
    child: subprocess.Popen[bytes]
    output: Path
    begin_ns: int
    end_ns: int | None = None
    ready: bool = False
    seen: OutputTail = field(default_factory=OutputTail)

    @property
    def ended(self) -> bool:
        return self.end_ns is not None

    def look(self, now_ns: int) -> None:
        """Take note if it has ended."""
        if self.end_ns is None and self.child.poll() is not None:
            self.end_ns = now_ns

    def look_whether_ready(self) -> None:
        """Take note if it is ready."""
        command = self.command
        self.ready = (command.ready_port is None or read_is_listening(self.child.pid, command.ready_port)) and (
            command.ready_output is None or self.seen.search(command.ready_output, self.output)
        )


@dataclass(frozen=True, eq=False)
class _Iteration:
    wall_ns: int
    machine: MachineSamples
    wall_paused_ns: npt.NDArray[np.float64]
    commands: tuple[CommandSample, ...]


class ApplicationCarrier:
    """Runs the applications of a fabric's scenario.

    Args:
        fabric: The fabric.
        folder: For what they write.
        nics: How programs call the NICs of each host.
        netns: Descriptor of each host's network namespace.
        private: Folder for the host file and the program ``{rsh}``.
        probe: The fidelity probe.
        clock: Source of time.
        flow: PFC on the fabric.
        cpus: CPUs that programs may use.
    """

    def __init__(
        self,
        fabric: Fabric,
        folder: Path,
        nics: Sequence[Sequence[NicNames]],
        netns: Sequence[int],
        private: Path,
        probe: ProbeLink,
        clock: MonotonicClock,
        flow: FlowControl | NoFlowControl,
        cpus: Sequence[int],
    ) -> None:
        self._fabric = fabric
        self._folder = folder
        self._nics = nics
        self._netns = netns
        self._private = private
        self._clock = clock
        self._flow = flow
        self._ticks = FabricTicks(fabric, probe, clock, flow)
        self._cpus = cpus
        self._warnings: list[str] = []
        self._data = DataQueues(fabric.arrays.queues, np.zeros(0, np.int64), dict.fromkeys(range(8), 1))
        if fabric.back_ends.link_delay != "netem" and any(port.delay_ns for port in fabric.plan.topology.ports):
            chosen = fabric.plan.scenario.transport.link_delay is LinkDelay.CARRIER
            why = "transport.link_delay is carrier" if chosen else "this kernel has no netem"
            self._warnings.append(
                f"{why}, so propagation delays are not on the wire: applications see the time on links and in queues alone"
            )

    def warnings(self) -> list[str]:
        """Return what a reader of the figures should know."""
        return self._warnings

    def run(self, number: int, listener: ProgressListener) -> ApplicationSamples:
        """Run all iterations of the application of that index.

        Raises:
            RunError: A command failed, or took too long.
        """
        item = self._fabric.plan.applications[number]
        places = self._prepare(number, item)
        self._set_up(item, places)
        found: list[_Iteration] = []
        for iteration in range(item.warmup_iters + item.iters):
            warmup = iteration < item.warmup_iters
            index = iteration if warmup else iteration - item.warmup_iters
            listener.iteration(index, item.warmup_iters if warmup else item.iters, warmup=warmup)
            one = self._run_once(item, places, f"{'warmup' if warmup else 'iteration'}{index}")
            if not warmup:
                found.append(one)
        return ApplicationSamples(
            wall_duration_ns=tuple(one.wall_ns for one in found),
            machine=tuple(one.machine for one in found),
            wall_paused_ns=np.sum([one.wall_paused_ns for one in found], axis=0),
            commands=tuple(one.commands for one in found),
            figures=self._read_figures(item, found),
        )

    def _prepare(self, number: int, item: ApplicationWorkload) -> Places:
        """Write the item's files; return what its placeholders stand for."""
        plan = self._fabric.plan
        folder = self._folder / f"{number}-{item.application}"
        names = [node.name for node in plan.topology.hosts]
        places = Places(
            nics=self._nics,
            names=names,
            folder=folder,
            hostfile=self._private / "hosts",
            rsh=self._private / f"rsh{number}",
            traffic_class=data_tos(plan.scenario.qos.lossless_priority),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in item.files.items():
                (folder / name).write_text(content, encoding="utf-8")
        except OSError as error:
            raise TestbedError(f"{error.filename} cannot be written: {error.strerror}", hint="use --output") from None
        places.hostfile.write_text("".join(f"{name}\n" for name in names))
        namespaces = [self._fabric.namespace_of(name) for name in names]
        places.rsh.write_text(render_rsh(places, namespaces, item.environment))
        places.rsh.chmod(0o755)
        return places

    def _set_up(self, item: ApplicationWorkload, places: Places) -> None:
        """Run the item's setup, outside the fabric."""
        deadline = time.monotonic() + item.wall_timeout_ns / 1e9
        for number, text in enumerate(item.setup):
            line = places.fill(text, None, shell=True)
            output = places.folder / f"setup-{number}.out"
            with self._ending(item) as children:
                child = self._start(line, None, dict(os.environ), output, places)
                children.append(child)
                while child.poll() is None:
                    if time.monotonic() > deadline:
                        raise RunError(_describe(item, "setup", line, _took_too_long(item), output))
                    time.sleep(_SETUP_LOOK_S)
                if child.returncode:
                    raise RunError(_describe(item, "setup", line, _how_it_ended(child.returncode), output))

    def _start(
        self, line: str, host: int | None, environment: Mapping[str, str], output: Path, places: Places
    ) -> subprocess.Popen[bytes]:
        return start_program(
            ["/bin/sh", "-c", line],
            folder=places.folder,
            environment=environment,
            mark=self._fabric.state.mark,
            stdout=output,
            stderr=output.with_suffix(".err"),
            cpus=self._cpus,
            netns_fd=None if host is None else self._netns[host],
        )

    @contextlib.contextmanager
    def _ending(self, item: ApplicationWorkload) -> Iterator[list[subprocess.Popen[bytes]]]:
        """End programs and what they have started, however the block ends; say which of them could not be ended.

        Yields:
            The list for the programs.
        """
        children: list[subprocess.Popen[bytes]] = []
        left: list[int] = []
        try:
            try:
                yield children
            finally:
                with signals_held():
                    left = end_programs(children, self._fabric.state.mark, self._pass_tick)
        except RunError as error:
            if left:
                raise RunError(f"{error.message}\n{_could_not_end(left)}") from None
            raise
        if left:
            self._warnings.append(f"{item.application}: {_could_not_end(left)}")

    def _pass_tick(self) -> None:
        """Let a tick pass in which nothing runs but the fabric: pauses are obeyed."""
        self._flow.tick(self._clock.now_ns())
        self._clock.sleep_until_ns(self._clock.now_ns() + self._fabric.plan.dilation.wall_tick_ns)

    def _settle(self, item: ApplicationWorkload) -> int:
        """Wait until nothing that programs have sent is under way any more: it is not the next iteration's.

        Returns:
            Bytes that entered a queue and never left it: the kernel lost them between two ports.
        """
        begin = moved_at = time.monotonic()
        empty, moved = 0, -1
        while empty < _REST_LOOKS:  # a frame between two queues is in none
            self._pass_tick()
            now = time.monotonic()
            empty = 0 if self._data.standing_bytes() or self._flow.any_closed else empty + 1
            left = self._data.left_bytes()
            if left != moved or self._flow.any_closed:
                moved, moved_at = left, now
            if now - moved_at > _STUCK_S and not empty:
                lost = self._data.write_off()
                self._flow.forget_frames()
                return lost
            if now - begin > _SETTLE_S:
                self._warnings.append(
                    f"{item.application}: {_SETTLE_S:g} s after its end the fabric was not at rest; what was under way may be in "
                    "the next figures"
                )
                break
        return 0

    def _begin(self, item: ApplicationWorkload, places: Places, number: int, label: str, now_ns: int) -> _Running:
        command = item.commands[number]
        line = places.fill(command.command, command.host, shell=True)
        variables = {**item.environment, **command.environment}
        environment = {
            **os.environ,
            **{name: places.fill(text, command.host, shell=False) for name, text in variables.items()},
        }
        output = places.folder / f"{label}-{number}-host{command.host}.out"
        child = self._start(line, command.host, environment, output, places)
        return _Running(number, command, line, child, output, now_ns)

    def _run_once(self, item: ApplicationWorkload, places: Places, label: str) -> _Iteration:
        ticks = self._ticks
        running: list[_Running] = []
        begin = ticks.restart()
        with self._ending(item) as children:
            while True:
                now = ticks.begin()
                for one in running:
                    one.look(now)
                    _check(item, one)
                if len(running) < len(item.commands):
                    if not running or _may_follow(item, running[-1], ticks.count):
                        running.append(self._begin(item, places, len(running), label, now))
                        children.append(running[-1].child)
                elif all(one.ended for one in running if one.command.mode is not CommandMode.SERVICE):
                    break
                if now - begin > item.wall_timeout_ns:
                    left = next((one for one in running if not one.ended), running[-1])
                    what = _took_too_long(item)
                    raise RunError(_describe(item, f"host{left.command.host}", left.line, what, left.output))
                ticks.end()
            wall_ns = now - begin
            wall_paused_ns = ticks.wall_paused_ns(now)
            # Programs run on this machine's clock, not on ticks: those add nothing.
            machine = ticks.samples(wall_ns, resolution_error_fraction=0.0)
        machine = replace(machine, unaccounted_bytes=self._settle(item))
        return _Iteration(
            wall_ns,
            machine,
            wall_paused_ns,
            tuple(
                CommandSample(
                    one.command.host,
                    one.line,
                    one.child.returncode if one.ended else None,
                    (now if one.end_ns is None else one.end_ns) - one.begin_ns,
                    one.output.relative_to(self._folder),
                )
                for one in running
            ),
        )

    def _read_figures(
        self, item: ApplicationWorkload, found: Sequence[_Iteration]
    ) -> dict[str, tuple[float | None, ...]]:
        """Return each figure of each iteration, and note those that are not there."""
        figures: dict[str, tuple[float | None, ...]] = {}
        written = [[_read_end(self._folder / sample.output) for sample in one.commands] for one in found]
        for figure in item.figures:
            values = tuple(find_figure(figure.pattern, texts) for texts in written)
            if None in values:
                self._warnings.append(
                    f"{item.application}: figure {figure.name} is not known: nothing that was written matches {figure.pattern!r} "
                    "with a finite number"
                )
            figures[figure.name] = values
        return figures


def find_figure(pattern: str, texts: Sequence[str]) -> float | None:
    """Return the number of the last match of a pattern's only group in some texts; None where it is no finite decimal number."""
    matches = [match[1] for text in texts for match in re.finditer(pattern, text, re.MULTILINE)]
    last = (matches[-1] or "").strip() if matches else ""
    if not _NUMBER.fullmatch(last):
        return None
    value = float(last)
    return value if math.isfinite(value) else None


def _may_follow(item: ApplicationWorkload, last: _Running, ticks: int) -> bool:
    """Return whether the next command may begin behind the last that was begun."""
    if last.command.mode is CommandMode.FOREGROUND:
        return last.ended
    if not last.ready and ticks % _READY_LOOK_TICKS == 0:
        last.look_whether_ready()
        if last.ended and not last.ready:
            raise RunError(
                _describe(item, f"host{last.command.host}", last.line, "ended before it was ready", last.output)
            )
    return last.ready


def _check(item: ApplicationWorkload, one: _Running) -> None:
    """Raise RunError if a command has failed."""
    code = one.child.returncode
    if code:
        raise RunError(_describe(item, f"host{one.command.host}", one.line, _how_it_ended(code), one.output))


def _how_it_ended(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"


def _took_too_long(item: ApplicationWorkload) -> str:
    return f"had not ended after wall_timeout, {item.wall_timeout_ns / 1e9:g} s"


def _could_not_end(pids: Sequence[int]) -> str:
    return f"could not be ended and still run: processes {', '.join(str(pid) for pid in pids)}"


def _describe(item: ApplicationWorkload, where: str, line: str, what: str, output: Path) -> str:
    """Return what went wrong with a command, and what it said last."""
    said = _last_lines(output.with_suffix(".err")) or _last_lines(output)
    shown = line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
    head = f"application {item.application}, {where}: `{shown.strip()}` {what}"
    return "\n".join([f"{head}; it said last:", *said]) if said else f"{head}; it said nothing"


def _last_lines(file: Path) -> list[str]:
    lines = [line for line in _read_end(file).splitlines() if line.strip()]
    return [f"  {line[:_SHOWN_CHARACTERS]}" for line in lines[-_SHOWN_LINES:]]


def _read_end(file: Path) -> str:
    """Return the end of what a program has written."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _READ_BYTES))
            return opened.read().decode(errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def application_carrier(
    fabric: Fabric, folder: Path | None, waiting: Callable[[], None] = lambda: None
) -> Iterator[tuple[ApplicationCarrier, list[str]]]:
    """Make a fabric ready for applications for the block: devices, where the carrier is soft-RoCE.

    Args:
        fabric: The fabric; built for any workload.
        folder: The results' folder; None keeps nothing of what they write.
        waiting: Called when another run has the machine; this one then waits for it.

    Yields:
        What runs them, and warnings about what the machine refused.

    Raises:
        MachineError: This machine lacks something.
    """
    clock = MonotonicClock()
    cpus = available_cpus()
    engine_cpu, port_cpus = choose_cpus()
    with contextlib.ExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="testbed-application-")))
        netns = []
        for node in fabric.plan.topology.hosts:
            netns.append(open_namespace(fabric.namespace_of(node.name)))
            stack.callback(os.close, netns[-1])
        nics = _name_nics(fabric, netns, stack)
        probe = stack.enter_context(contextlib.closing(ProbeLink(fabric.probe_cpu, clock.now_ns)))
        host_warnings = stack.enter_context(tuned_host(port_cpus, waiting))
        warnings = stack.enter_context(engine_thread(engine_cpu))
        flow = stack.enter_context(flow_control(fabric, clock.now_ns()))
        kept = private / "output" if folder is None else folder.resolve() / FOLDER
        carrier = ApplicationCarrier(fabric, kept, nics, netns, private, probe, clock, flow, cpus)
        yield carrier, host_warnings + warnings


def _name_nics(fabric: Fabric, netns: Sequence[int], stack: contextlib.ExitStack) -> list[list[NicNames]]:
    """Return how programs call the NICs of each host, after making devices where the carrier is soft-RoCE."""
    topology = fabric.plan.topology
    host_of = {node.index: number for number, node in enumerate(topology.hosts)}
    devices: dict[int, str] = {}
    if fabric.plan.scenario.transport.carrier is Carrier.RXE:
        devices = stack.enter_context(fabric.run_devices(topology.nics))
        load_connection_manager()
    names: list[list[NicNames]] = [[] for _ in netns]
    for port in topology.nics:
        address = socket.inet_ntoa(struct.pack("!I", port.address))
        device = devices.get(port.id, "")
        index = find_gid(device, address)[0] if device else 0
        names[host_of[port.node]].append(NicNames(address, port.ifname, device, index))
    return names
