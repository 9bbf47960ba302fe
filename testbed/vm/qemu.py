"""QEMU's command line. Pure: values from values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from testbed.vm.guest import CONTROL_PORT, ROOT_TAG, STDERR_PORT, STDOUT_PORT, output_tag

# x86-64-v2, which numpy wants; later ones have vector units that software emulation would have to imitate.
_EMULATED_CPU = "Westmere"


class Accelerator(StrEnum):
    """Who executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class MachineFiles:
    """The files of one machine.

    Attributes:
        image: The kernel.
        initramfs: Its first root, None where it needs none.
        init: The guest's first process, a path of the root.
        root_socket: Where virtiofsd serves the root.
        console: What the guest's kernel writes.
        stdout: Descriptor of the socket for the command's standard output.
        stderr: The same for its standard error.
        control: The same for the words of the guest's first process.
    """

    image: Path
    initramfs: Path | None
    init: Path
    root_socket: Path
    console: Path
    stdout: int
    stderr: int
    control: int


def build_qemu_command(
    program: str,
    files: MachineFiles,
    *,
    accelerator: Accelerator,
    virtual_time: bool,
    skip_idle: bool = False,
    cpus: int,
    memory_bytes: int,
    outputs: Sequence[Path],
) -> list[str]:
    """Return QEMU's command line.

    Args:
        program: QEMU's own path.
        files: The files of the machine.
        accelerator: Who executes.
        virtual_time: Count instructions, one to the nanosecond; needs software emulation and one CPU.
        skip_idle: In virtual time, go on at once where the guest would wait for a timer.
        cpus: Number of CPUs.
        memory_bytes: The guest's memory.
        outputs: Folders that are shared, writable.

    Raises:
        ValueError: Virtual time with KVM, or with several CPUs.
    """
    if virtual_time and (accelerator is not Accelerator.TCG or cpus != 1):
        raise ValueError("virtual time needs TCG and a single CPU")
    memory = f"{memory_bytes >> 20}M"
    command = [program, "-machine", "q35", "-smp", str(cpus), "-m", memory, "-nodefaults", "-nographic", "-no-reboot"]
    command += ["-accel", str(accelerator), "-cpu", "host" if accelerator is Accelerator.KVM else _EMULATED_CPU]
    if virtual_time:
        command += ["-icount", f"shift=0,sleep={'off' if skip_idle else 'on'}"]
    # virtiofsd reads and writes the guest's memory itself, so that must be shared.
    command += ["-object", f"memory-backend-memfd,id=mem,share=on,size={memory}", "-numa", "node,memdev=mem"]
    command += ["-chardev", f"socket,id=rootfs,path={files.root_socket}"]
    command += ["-device", f"vhost-user-fs-pci,queue-size=1024,chardev=rootfs,tag={ROOT_TAG}"]
    command += ["-serial", f"file:{files.console}", "-device", "virtio-serial-pci"]
    for name, descriptor in ((STDOUT_PORT, files.stdout), (STDERR_PORT, files.stderr), (CONTROL_PORT, files.control)):
        command += ["-chardev", f"socket,id={name},fd={descriptor}"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for index, path in enumerate(outputs):
        escaped = str(path).replace(",", ",,")
        command += ["-fsdev", f"local,id={output_tag(index)},path={escaped},security_model=none,multidevs=remap"]
        command += ["-device", f"virtio-9p-pci,fsdev={output_tag(index)},mount_tag={output_tag(index)}"]
    if files.initramfs is not None:
        command += ["-initrd", str(files.initramfs)]
    command += ["-kernel", str(files.image), "-append", build_kernel_arguments(files.init)]
    return command


def build_kernel_arguments(init: Path) -> str:
    """Return the kernel's command line: an oops is a panic, and a panic ends the machine."""
    return f"console=ttyS0 quiet panic=-1 oops=panic mitigations=off root={ROOT_TAG} rootfstype=virtiofs ro init={init}"


def build_virtiofsd_options(told: str, root: Path, socket: Path) -> list[str]:
    """Return the options with which virtiofsd serves a root.

    There are two programs of that name: QEMU's, in C, up to Debian 12, and one in Rust. Debian 13's in Rust understands the
    other's options too, so that only its help tells which it is. It tells the guest which folders are mount points, unless told
    not to: an overlay refuses such folders of the layer below, and the guest mounts over /proc and others of them.

    Args:
        told: What it says to ``--help``.
        root: The folder.
        socket: Where it listens.
    """
    if "--shared-dir" not in told:
        options = ["-o", f"source={root}", "-o", "cache=always", "-o", "sandbox=chroot"]
        return [*options, f"--socket-path={socket}", "--thread-pool-size=1"]
    options = [f"--shared-dir={root}", "--cache=always", "--sandbox=chroot", f"--socket-path={socket}"]
    quiet = "--no-announce-submounts"
    return [*options, quiet] if quiet in told else options
