"""The frames of a user's Python file: its ``frames()`` is called, what it yields becomes Ethernet frames.

The file is code. It runs in this process, as the user who calls, with all that user's rights.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)  # it warns of machines without a default route

from scapy.layers.inet import IP  # noqa: E402
from scapy.layers.l2 import Dot3, Ether  # noqa: E402
from scapy.packet import Packet, Raw  # noqa: E402

from testbed.errors import TestbedError  # noqa: E402

_MODULE = "testbed_frames"
_HINT = "it must define frames(), which yields scapy packets or bytes"


@dataclass(frozen=True, slots=True)
class Nic:
    """The NIC that frames leave from: what ``frames(nic)`` is given when it takes an argument.

    Attributes:
        host: Such as ``host0``.
        ifname: Such as ``eth0``.
        mac: Its MAC.
        address: Its IPv4 address.
        next_hop_mac: MAC of the leaf's port at the other end.
        mtu: Largest IP packet, bytes.
        addresses: The IPv4 address of every NIC of the fabric, by name: ``host3/eth0``; ``host3`` is its first.
    """

    host: str
    ifname: str
    mac: str
    address: str
    next_hop_mac: str
    mtu: int
    addresses: Mapping[str, str] = field(default_factory=dict)


def read_frames(file: Path, nic: Nic) -> Iterator[bytes]:
    """Yield the frames of a file, completed; what it prints goes to stderr.

    Raises:
        TestbedError: The file cannot be read, has an error (named with its line), or yields what is no frame.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        raise TestbedError(f"{file} cannot be read: {error.strerror}", hint=_HINT) from None
    yielded = _iterate(file, source, nic)
    number = 0
    while True:
        with _blamed_on(file), contextlib.redirect_stdout(sys.stderr):
            try:
                item = next(yielded)
            except StopIteration:
                return
        number += 1
        yield _build(file, number, item, nic)


def complete_packet(packet: Packet, nic: Nic) -> Packet:
    """Return a packet with what the user left out: Ethernet header, its MACs, the IPv4 source address.

    What is set stays as it is, however wrong: sending wrong frames is what this is for.
    """
    packet = packet.copy()
    if not isinstance(packet, Ether | Dot3 | Raw):
        packet = Ether() / packet
    if isinstance(packet, Ether | Dot3):
        packet.fields.setdefault("src", nic.mac)
        packet.fields.setdefault("dst", nic.next_hop_mac)
    ip = packet.getlayer(IP)
    if ip is not None:
        ip.fields.setdefault("src", nic.address)
    return packet


def _iterate(file: Path, source: bytes, nic: Nic) -> Iterator[Any]:
    with _blamed_on(file), contextlib.redirect_stdout(sys.stderr):
        module = types.ModuleType(_MODULE)
        module.__file__ = str(file)
        sys.modules[_MODULE] = module  # dataclasses and pickle look there
        if (folder := str(file.resolve().parent)) not in sys.path:
            sys.path.insert(0, folder)  # as `python FILE.py` does
        exec(compile(source, str(file), "exec"), module.__dict__)
    frames: Callable[..., Iterable[Any]] | None = getattr(module, "frames", None)
    if not callable(frames):
        raise TestbedError(f"{file}: there is no function frames()", hint=_HINT)
    with _blamed_on(file), contextlib.redirect_stdout(sys.stderr):
        result = frames(nic) if inspect.signature(frames).parameters else frames()
    if isinstance(result, bytes | bytearray | Packet):  # one frame; both can be iterated, which is not what was meant
        return iter([result])
    if not isinstance(result, Iterable):
        raise TestbedError(f"{file}: frames() gave {type(result).__name__}, which cannot be iterated", hint=_HINT)
    return iter(result)


def _build(file: Path, number: int, item: object, nic: Nic) -> bytes:
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if not isinstance(item, Packet):
        raise TestbedError(
            f"{file}: frame {number} is {type(item).__name__}, neither a scapy packet nor bytes", hint=_HINT
        )
    try:
        return bytes(complete_packet(item, nic))
    except Exception as error:  # scapy raises whatever a field's code happens to raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TestbedError(f"{file}: scapy cannot build frame {number} ({item.summary()}): {reason}") from None


@contextlib.contextmanager
def _blamed_on(file: Path) -> Iterator[None]:
    """Turn what the user's code raises into an error that names the line."""
    try:
        yield
    except (StopIteration, TestbedError):
        raise
    except SyntaxError as error:
        if error.filename not in (None, str(file)):  # in a module that the file imports
            raise TestbedError(f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}") from None
        raise TestbedError(f"{file}:{error.lineno}: SyntaxError: {error.msg}") from None
    except Exception as error:
        lines = [entry.lineno for entry in traceback.extract_tb(error.__traceback__) if entry.filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise TestbedError(f"{where}: {words}") from None
