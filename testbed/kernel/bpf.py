"""eBPF by libbpf: load the fabric's object and map its arrays (``tc.py`` attaches its programs).

libbpf comes with iproute2 on every distribution; ctypes reaches the dozen functions needed, so users need no clang and
the package no C extension.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from testbed.errors import KernelError, MachineError

OBJECT_PATH = Path(__file__).parent.parent / "bpf" / "fabric.bpf.o"
_BPF_OBJ_GET_INFO_BY_FD = 15
_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

_libc = ctypes.CDLL(None, use_errno=True)
_libbpf: ctypes.CDLL | None = None


def _load_libbpf() -> ctypes.CDLL:
    global _libbpf
    if _libbpf is None:
        name = ctypes.util.find_library("bpf") or "libbpf.so.1"
        try:
            library = ctypes.CDLL(name, use_errno=True)
        except OSError:
            raise MachineError("libbpf is not installed", hint="apt-get install libbpf1") from None
        pointer = ctypes.c_void_p
        for function, result, arguments in (
            ("bpf_object__open_file", pointer, [ctypes.c_char_p, pointer]),
            ("bpf_object__load", ctypes.c_int, [pointer]),
            ("bpf_object__close", None, [pointer]),
            ("bpf_object__find_map_by_name", pointer, [pointer, ctypes.c_char_p]),
            ("bpf_object__find_program_by_name", pointer, [pointer, ctypes.c_char_p]),
            ("bpf_map__set_max_entries", ctypes.c_int, [pointer, ctypes.c_uint32]),
            ("bpf_map__set_initial_value", ctypes.c_int, [pointer, pointer, ctypes.c_size_t]),
            ("bpf_map__fd", ctypes.c_int, [pointer]),
            ("bpf_program__fd", ctypes.c_int, [pointer]),
            ("bpf_map_update_elem", ctypes.c_int, [ctypes.c_int, pointer, pointer, ctypes.c_uint64]),
            ("bpf_map_lookup_elem", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
            ("bpf_map_delete_elem", ctypes.c_int, [ctypes.c_int, pointer]),
            ("bpf_map_get_next_key", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
            ("bpf_map_get_fd_by_id", ctypes.c_int, [ctypes.c_uint32]),
            ("bpf_prog_get_fd_by_id", ctypes.c_int, [ctypes.c_uint32]),
        ):
            entry = getattr(library, function)
            entry.restype, entry.argtypes = result, arguments
        library.libbpf_set_print(None)
        _libbpf = library
    return _libbpf


def _bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """Call bpf(2); return its result and the attribute block as the kernel left it."""
    number = _SYSCALL_NUMBER.get(platform.machine())
    if number is None:
        raise MachineError(f"bpf(2) is not known for {platform.machine()}", hint="run on x86-64 or arm64")
    block = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(ctypes.c_long(number), ctypes.c_int(command), block, ctypes.c_uint(len(attributes)))
    return int(result), block.raw


@dataclass
class LoadedObject:
    """The programs and maps of one lab, by file descriptor; closing keeps what is attached.

    Attributes:
        programs: Program name to file descriptor.
        maps: Map name to file descriptor.
    """

    programs: dict[str, int]
    maps: dict[str, int]
    _open: bool = field(default=True, repr=False)

    def close(self) -> None:
        """Close the descriptors; attached programs keep themselves and their maps alive."""
        if self._open:
            self._open = False
            for fd in (*self.programs.values(), *self.maps.values()):
                os.close(fd)


def load_object(
    *,
    map_entries: Mapping[str, int],
    initial_values: Mapping[str, bytes],
    programs: tuple[str, ...],
    path: Path = OBJECT_PATH,
) -> LoadedObject:
    """Load the fabric's eBPF object.

    Args:
        map_entries: ``max_entries`` of each array.
        initial_values: Contents of read-only sections, by section name.
        programs: Names of the programs wanted.
        path: The compiled object.

    Raises:
        MachineError: The object or libbpf is missing.
        KernelError: The kernel refused it.
    """
    library = _load_libbpf()
    if not path.exists():
        raise MachineError(f"{path} is not built", hint="scripts/build-bpf")
    handle = library.bpf_object__open_file(os.fsencode(path), None)
    if not handle:
        raise KernelError(f"open {path.name}", ctypes.get_errno())
    try:
        for name, entries in map_entries.items():
            found = library.bpf_object__find_map_by_name(handle, name.encode())
            if not found or library.bpf_map__set_max_entries(found, max(1, entries)) < 0:
                raise KernelError(f"size eBPF map {name} to {entries}", errno.ENOENT)
        for name, value in initial_values.items():
            found = library.bpf_object__find_map_by_name(handle, name.encode())
            if not found or library.bpf_map__set_initial_value(found, value, len(value)) < 0:
                raise KernelError(f"set eBPF section {name} ({len(value)} bytes)", errno.EINVAL)
        result = library.bpf_object__load(handle)
        if result < 0:
            raise KernelError(
                f"load {path.name}",
                -result,
                hint=f"`bpftool prog loadall {path} /sys/fs/bpf/x` shows the verifier's words; `testbed doctor`",
            )
        program_fds = {
            name: os.dup(library.bpf_program__fd(library.bpf_object__find_program_by_name(handle, name.encode())))
            for name in programs
        }
        map_fds = {
            name: os.dup(library.bpf_map__fd(library.bpf_object__find_map_by_name(handle, name.encode())))
            for name in map_entries
        }
    finally:
        library.bpf_object__close(handle)
    return LoadedObject(program_fds, map_fds)


def read_id(fd: int) -> int:
    """Return the kernel-wide id of a program or map."""
    info = ctypes.create_string_buffer(256)
    block = struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))
    result, _ = _bpf(_BPF_OBJ_GET_INFO_BY_FD, block)
    if result < 0:
        raise KernelError("bpf obj get info", ctypes.get_errno())
    return int(struct.unpack_from("=II", info.raw)[1])


def open_map(map_id: int) -> int:
    """Return a file descriptor of a map that is still in use.

    Raises:
        KernelError: It is gone.
    """
    fd = _load_libbpf().bpf_map_get_fd_by_id(map_id)
    if fd < 0:
        raise KernelError(f"bpftool map show id {map_id}", ctypes.get_errno())
    return int(fd)


def write_map(fd: int, key: bytes, value: bytes) -> None:
    """Write an entry of a map, new or old.

    Raises:
        KernelError: The map is full (E2BIG), or may not be written.
    """
    if _load_libbpf().bpf_map_update_elem(fd, key, value, 0) < 0:
        raise KernelError("bpftool map update", ctypes.get_errno())


def read_map(fd: int, key_bytes: int, value_bytes: int) -> list[tuple[bytes, bytes]]:
    """Return the entries of a map that nobody else writes meanwhile.

    Raises:
        KernelError: It may not be read.
    """
    library = _load_libbpf()
    entries: list[tuple[bytes, bytes]] = []
    before, key = None, ctypes.create_string_buffer(key_bytes)
    value = ctypes.create_string_buffer(value_bytes)
    while library.bpf_map_get_next_key(fd, before, key) == 0:
        if library.bpf_map_lookup_elem(fd, key, value) == 0:
            entries.append((key.raw, value.raw))
        before = ctypes.create_string_buffer(key.raw, key_bytes)
    if ctypes.get_errno() != errno.ENOENT:
        raise KernelError("bpftool map dump", ctypes.get_errno())
    return entries


def delete_map_entry(fd: int, key: bytes) -> None:
    """Delete an entry of a map, if it is there.

    Raises:
        KernelError: The map may not be written.
    """
    if _load_libbpf().bpf_map_delete_elem(fd, key) < 0 and ctypes.get_errno() != errno.ENOENT:
        raise KernelError("bpftool map delete", ctypes.get_errno())


def map_array(fd: int, nbytes: int) -> mmap.mmap:
    """Map an array created with BPF_F_MMAPABLE for reading and writing."""
    page = mmap.PAGESIZE
    return mmap.mmap(fd, (nbytes + page - 1) // page * page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
