"""Boots a guest, runs a command in it, and brings back its output and exit code."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import MachineError, VmError
from testbed.vm.guest import EXITED, STARTED, render_init
from testbed.vm.kernels import GuestKernel
from testbed.vm.model import VmJob, VmListener
from testbed.vm.qemu import Accelerator, MachineFiles, build_qemu_command, build_virtiofsd_options

_QEMU = "qemu-system-x86_64"
# The last is QEMU's own, in C, or a link to the one in Rust.
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
_ATTEMPTS = 2
_CONSOLE_LINES = 15
_SOCKET_TIMEOUT_S = 20.0
_POWER_OFF_TIMEOUT_S = 10.0
_KVM_PROBE_TIMEOUT_S = 20.0
_MAX_CPUS = 4
_CHUNK_BYTES = 1 << 16
# The command's variables that come from the host: what says how to talk, and what is for us.
_PASSED_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "COLUMNS", "CI", "VIRTUAL_ENV", "PYTHONPATH", "USER")
# Binds the root below $1, without what the guest mounts itself, makes every mount there read-only, and becomes the command.
_ROOT_SCRIPT = """\
root=$1; shift
mount --rbind / "$root" && mount --make-rprivate "$root" || exit 1
each_mount() { while read -r _ _ _ _ point _; do case $point in "$1"|"$1"/*) $2 "$(printf %b "$point")" || exit 1;; esac; done; }
leave() { umount -l "$1" 2>/dev/null || true; }
seal() { mount -o remount,bind,ro "$1"; }
for special in proc sys dev run; do
    each_mount "$root/$special" leave </proc/self/mountinfo
    mount -t tmpfs -o size=4k tmpfs "$root/$special" || exit 1
done
each_mount "$root" seal </proc/self/mountinfo
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class _Programs:
    qemu: str
    virtiofsd: str


class _GuestDiedError(Exception):
    """The machine ended without saying how its command ended."""


def run_in_vm(job: VmJob, kernel: GuestKernel, listener: VmListener) -> int:
    """Run a command in a guest with this process's standard output and error; return its exit code. Needs root.

    Args:
        job: The command and its machine.
        kernel: The guest's kernel.
        listener: Told of the machine.

    Raises:
        MachineError: This machine lacks what runs a guest.
        VmError: The machine died twice, or the command took longer than it may.
    """
    programs = _find_programs()
    accelerator = Accelerator.TCG if job.virtual_time or not probe_kvm(programs.qemu) else Accelerator.KVM
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _run_once(job, kernel, listener, programs, accelerator)
        except _GuestDiedError as death:
            if attempt == _ATTEMPTS:
                raise VmError(
                    f"the virtual machine died {_ATTEMPTS} times; the last time: {death}",
                    hint="this says nothing of the command; try --kernel with another kernel, or --memory with more",
                ) from None
            listener.note(f"the virtual machine died, and is booted once more: {death}")
    raise AssertionError


def _find_programs() -> _Programs:
    """Return what runs a guest.

    Raises:
        MachineError: Something is missing; the hint names all packages that are.
    """
    qemu = shutil.which(_QEMU)
    virtiofsd = next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)
    lacking = []
    if qemu is None:
        lacking.append((_QEMU, "qemu-system-x86"))
    if virtiofsd is None:
        # bookworm's is in a package that qemu-system-x86 needs anyway; from trixie on it is one of its own.
        lacking.append(
            ("virtiofsd", "$(apt-cache show virtiofsd >/dev/null 2>&1 && echo virtiofsd || echo qemu-system-common)")
        )
    for program, package in (("unshare", "util-linux"), ("modprobe", "kmod")):
        if shutil.which(program) is None:
            lacking.append((program, package))
    if lacking:
        names = ", ".join(name for name, _ in lacking)
        packages = " ".join(dict.fromkeys(package for _, package in lacking))
        raise MachineError(
            f"this machine cannot run a virtual machine: it lacks {names}",
            hint=f"scripts/setup-vm, or: apt-get install --no-install-recommends {packages}",
        )
    assert qemu is not None
    assert virtiofsd is not None
    return _Programs(qemu, virtiofsd)


def probe_kvm(qemu: str) -> bool:
    """Return whether KVM runs a guest here: QEMU must come up under it, and firmware must run to its end."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with tempfile.TemporaryDirectory(prefix="testbed-kvm-") as folder:
        log = Path(folder) / "log"
        command = [qemu, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "64M", "-nodefaults", "-nographic"]
        # Firmware that finds nothing to boot says so on its debug port, if instructions are executed as they should be.
        command += [
            "-no-reboot",
            "-chardev",
            f"file,id=log,path={log}",
            "-device",
            "isa-debugcon,iobase=0x402,chardev=log",
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as child:
            assert child.stderr is not None
            deadline = time.monotonic() + _KVM_PROBE_TIMEOUT_S
            try:
                while child.poll() is None and time.monotonic() < deadline:
                    if log.exists() and "No bootable device" in log.read_text(errors="replace"):
                        break
                    time.sleep(0.1)
                else:
                    return False
            finally:
                child.kill()
            complaints = child.stderr.read().decode(errors="replace")
            # A KVM that hides features of the CPU is one nested in another, under which stock kernels do not run.
            return "host doesn't support" not in complaints


def _run_once(
    job: VmJob, kernel: GuestKernel, listener: VmListener, programs: _Programs, accelerator: Accelerator
) -> int:
    how = "virtual time" if job.virtual_time else str(accelerator)
    listener.note(f"booting Linux {kernel.release} ({how})")
    with contextlib.ExitStack() as stack:
        # On the root file system: a folder of a tmpfs on /tmp is in the guest as well, one below /run is not.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="testbed-vm-"))).resolve()
        init = folder / "init"
        init.write_text(render_init(job, kernel.folder, kernel.release, _passed_environment()))
        init.chmod(0o755)
        console = folder / "console"
        console.touch()
        root_socket = stack.enter_context(_serve_root(folder, programs))
        ends = [socket.socketpair() for _ in range(3)]  # of sockets QEMU waits for a slow reader without standing still
        readers = [stack.enter_context(reader) for reader, _ in ends]
        writers = [stack.enter_context(writer) for _, writer in ends]
        command = build_qemu_command(
            programs.qemu,
            MachineFiles(
                kernel.image, kernel.initramfs, init, root_socket, console, *(writer.fileno() for writer in writers)
            ),
            accelerator=accelerator,
            virtual_time=job.virtual_time,
            skip_idle=job.skip_idle,
            cpus=1 if accelerator is Accelerator.TCG else min(_MAX_CPUS, os.cpu_count() or 1),
            memory_bytes=job.memory_bytes,
            outputs=job.outputs,
        )
        log = stack.enter_context((folder / "qemu.log").open("wb"))
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer.fileno() for writer in writers],
            start_new_session=True,
        )
        for writer in writers:  # so that QEMU's end is an end of file here
            writer.close()
        stack.callback(_end, child)
        code = _attend(job, readers, listener)
        if code is None:
            _end(child)
            raise _GuestDiedError(_describe_death(child.returncode, console, folder / "qemu.log"))
        with contextlib.suppress(subprocess.TimeoutExpired):  # its files are written already
            child.wait(_POWER_OFF_TIMEOUT_S)
        return code


def _attend(job: VmJob, readers: list[socket.socket], listener: VmListener) -> int | None:
    """Pass on what the command writes until the machine ends; return its exit code, None if it was never told.

    Raises:
        VmError: The command took longer than it may.
    """
    stdout, stderr, control = readers
    sinks = {stdout: sys.stdout, stderr: sys.stderr}
    booted = time.monotonic()
    deadline: float | None = booted + job.boot_timeout_s
    words, code, started = b"", None, False
    with selectors.DefaultSelector() as selector:
        for one in readers:
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                if not started:
                    return None
                raise VmError(
                    f"`{' '.join(job.command)}` did not end within {job.timeout_s:g} s", hint="give --timeout more"
                )
            for key, _ in selector.select(left):
                reader = key.fileobj
                assert isinstance(reader, socket.socket)
                data = reader.recv(_CHUNK_BYTES)
                if not data:
                    selector.unregister(reader)
                elif reader is control:
                    words += data
                    *lines, words = words.split(b"\n")
                    for line in lines:
                        word, _, rest = line.decode().partition(" ")
                        if word == STARTED:
                            started = True
                            listener.note(f"booted in {time.monotonic() - booted:.0f} s")
                            deadline = None if job.timeout_s is None else time.monotonic() + job.timeout_s
                        elif word == EXITED:
                            code = int(rest)
                            deadline = time.monotonic() + _POWER_OFF_TIMEOUT_S
                else:
                    sink = sinks[reader]
                    sink.flush()
                    sink.buffer.write(data)
                    sink.buffer.flush()
            if code is not None:  # all that the command wrote came before
                break
        if code is not None:
            _drain(readers[:2])
    return code


def _drain(readers: list[socket.socket]) -> None:
    """Pass on what is in the pipes still."""
    for reader, sink in zip(readers, (sys.stdout, sys.stderr), strict=True):
        with contextlib.suppress(BlockingIOError):
            while data := reader.recv(_CHUNK_BYTES):
                sink.buffer.write(data)
        sink.buffer.flush()


@contextlib.contextmanager
def _serve_root(folder: Path, programs: _Programs) -> Iterator[Path]:
    """Serve this machine's root, read-only, for the block; yield the socket.

    The mount namespace is virtiofsd's own: the mounts go with it.
    """
    root, path = folder / "root", folder / "root.sock"
    root.mkdir()
    told = subprocess.run([programs.virtiofsd, "--help"], capture_output=True, text=True, check=False).stdout
    serve = build_virtiofsd_options(told, root, path)
    with (folder / "virtiofsd.log").open("w+") as log:
        child = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                _ROOT_SCRIPT,
                "sh",
                str(root),
                programs.virtiofsd,
                *serve,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _SOCKET_TIMEOUT_S
            while not path.exists():
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise VmError(
                        f"virtiofsd does not serve this machine's root: {_last_line(log.read())}",
                        hint="mounting needs root and CAP_SYS_ADMIN; in a container, run it privileged",
                    )
                time.sleep(0.02)
            yield path
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a child of ours and its children, and wait for it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
    child.wait()


def _passed_environment() -> dict[str, str]:
    """Return the variables of this process that a guest gets."""
    return {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}


def _describe_death(code: int | None, console: Path, log: Path) -> str:
    """Return why a machine ended, from its console and from what QEMU said."""
    words = [line.strip() for line in console.read_text(errors="replace").splitlines() if line.strip()]
    said = log.read_text(errors="replace").strip()
    reason = next((line for line in words if "Kernel panic" in line or "testbed guest:" in line), None)
    reason = reason or (_last_line(said) if said else None) or f"QEMU ended with {code}, and nobody said why"
    return "\n".join([reason, *(f"  console: {line}" for line in words[-_CONSOLE_LINES:])])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
