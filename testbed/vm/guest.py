"""The script that is the guest's first process. Pure: text from values."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from testbed.host import GUEST_VARIABLE, REAL_TIME, VIRTUAL_TIME
from testbed.vm.model import VmJob

# Ports of the virtio console, by the names that QEMU gives and the guest reads.
STDOUT_PORT, STDERR_PORT, CONTROL_PORT = "testbed.stdout", "testbed.stderr", "testbed.control"
# Words on the control port.
STARTED = "started"
EXITED = "exited"

ROOT_TAG = "rootfs"
# What the guest's modprobe loads before anything else may need it; each may also be built in.
_FIRST_MODULES = ("overlay", "virtio_console", "9pnet_virtio", "9p")
_SCRATCH = "/mnt"

_SCRIPT = """\
#!/bin/sh
# The first process of a guest: make the root writable in memory, run one command, say how it ended, power off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
fail() {{ echo "testbed guest: $1" >/dev/console; echo o >/proc/sysrq-trigger; while :; do :; done; }}
mount -t proc proc /proc || fail "mounting /proc"
mount -t sysfs sysfs /sys || fail "mounting /sys"
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev || fail "mounting /dev" # the kernel may have done it
for module in {modules}; do modprobe -q -d {kernel_folder} "$module"; done
mount -t tmpfs -o size=90% tmpfs {scratch} || fail "mounting a tmpfs"
mkdir {scratch}/upper {scratch}/work {scratch}/root
root={scratch}/root
mount -t overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work overlay $root || fail "mounting the overlay"
mount -t proc proc $root/proc && mount -t sysfs sysfs $root/sys && mount -t devtmpfs devtmpfs $root/dev || fail "mounting"
mkdir -p $root/lib/modules $root/dev/pts $root/dev/shm $root/run $root/tmp
mount -t devpts -o ptmxmode=666 devpts $root/dev/pts
mount -t tmpfs tmpfs $root/dev/shm
mount -t tmpfs tmpfs $root/run
mkdir -p $root/run/lock $root/run/netns
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t bpf bpf $root/sys/fs/bpf
mount -t tracefs tracefs $root/sys/kernel/tracing 2>/dev/null
mkdir -p $root/lib/modules/{release}
mount --bind {kernel_folder}/lib/modules/{release} $root/lib/modules/{release} || fail "the kernel's modules"
{output_mounts}
port() {{ # the device of the console's port of that name; the kernel numbers them as it likes
    for name in /sys/class/virtio-ports/*/name; do
        device=${{name%/name}}
        if [ "$(cat "$name" 2>/dev/null)" = "$1" ] && [ -c "/dev/${{device##*/}}" ]; then echo "/dev/${{device##*/}}"; return; fi
    done
}}
tries=0
while :; do
    stdout=$(port {stdout}); stderr=$(port {stderr}); control=$(port {control})
    [ -z "$stdout" ] || [ -z "$stderr" ] || [ -z "$control" ] || break
    tries=$((tries + 1)); [ $tries -lt 200 ] || fail "the console's ports do not appear"
    sleep 0.05
done
hostname testbed-vm
cat >$root/run/testbed-guest.sh <<'END_OF_GUEST_SCRIPT'
{inner}
END_OF_GUEST_SCRIPT
# The kernel loads its modules with the modprobe of its own root: a chroot would leave that the old one.
mkdir $root/run/host-root
cd $root && pivot_root . run/host-root || fail "changing the root"
chroot . /bin/sh /run/testbed-guest.sh "$stdout" "$stderr" "$control"
echo o >/proc/sysrq-trigger
while :; do :; done
"""

# Each stream passes a pipe, so that a command may open /dev/stdout again, which a port does not allow.
_INNER = """\
exec 3>"$3"
ip link set lo up
ulimit -n 65536
mkfifo /run/stdout /run/stderr
cat /run/stdout >"$1" &
out=$!
cat /run/stderr >"$2" &
err=$!
echo {started} >&3
{assignments}
cd {folder} || exit 1
setsid -w {command} </dev/null >/run/stdout 2>/run/stderr 3>&-
code=$?
wait $out $err
sync
{output_unmounts}
echo {exited} $code >&3
"""


def output_tag(index: int) -> str:
    """Return the mount tag of the output folder of that index."""
    return f"output{index}"


def render_init(job: VmJob, kernel_folder: Path, release: str, environment: Mapping[str, str]) -> str:
    """Return the guest's first process as a shell script.

    Args:
        job: What is to be run.
        kernel_folder: The cached kernel; the modules are below it.
        release: The kernel's release.
        environment: Variables that every guest has; the job's own go over them.
    """
    clock = VIRTUAL_TIME if job.virtual_time else REAL_TIME
    variables = {**environment, **job.environment, GUEST_VARIABLE: clock}
    inner = _INNER.format(
        started=STARTED,
        exited=EXITED,
        assignments=_render_assignments(variables),
        folder=shlex.quote(str(job.folder)),
        command=shlex.join(job.command),
        output_unmounts=_render_lines(f"umount {shlex.quote(str(path))}" for path in job.outputs),
    )
    return _SCRIPT.format(
        modules=" ".join(_FIRST_MODULES),
        kernel_folder=shlex.quote(str(kernel_folder)),
        release=shlex.quote(release),
        scratch=_SCRATCH,
        output_mounts=_render_lines(_mount_output(index, path) for index, path in enumerate(job.outputs)),
        stdout=STDOUT_PORT,
        stderr=STDERR_PORT,
        control=CONTROL_PORT,
        inner=inner.rstrip("\n"),
    )


def _mount_output(index: int, path: Path) -> str:
    quoted = shlex.quote(str(path))
    return (
        f"mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 {output_tag(index)} $root{quoted} "
        f'|| fail "sharing an output folder"'
    )


def _render_assignments(variables: Mapping[str, str]) -> str:
    return _render_lines(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items()))


def _render_lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)
