"""Frames of RoCEv2 handed to a program, in a namespace whose kernel has no RoCE."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from testbed.errors import KernelError

_ROCE_UDP_PORT = 4791
_SO_RCVBUFFORCE = 33
# More than any requester has under way: a datagram that finds no room here would be a loss of ours.
_RECEIVE_BUFFER_BYTES = 1 << 24
_MAX_DATAGRAM_BYTES = 1 << 16
# What the headers of IPv4 stand behind in a frame. The ICRC does not cover it.
_ETHERNET_HEADER = bytes(12) + b"\x08\0"


@contextlib.contextmanager
def roce_listener(address: str) -> Iterator[socket.socket]:
    """Open a socket that gets every UDP datagram to an address of the calling thread's namespace, for the block.

    It comes behind the fabric's programs, so what the last link loses or they take is not seen; a packet socket would see it.
    With nobody at RoCE's port the kernel would also answer each datagram with an ICMP error, so a second socket sits there and
    lets go what it gets.

    Args:
        address: IPv4 address, dotted.

    Raises:
        KernelError: No permission, no such address, or something has RoCE's port.
    """
    with contextlib.ExitStack() as stack:
        try:
            sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            sink.bind((address, _ROCE_UDP_PORT))
            opened = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
            opened.bind((address, 0))
            opened.setblocking(False)
        except OSError as error:
            raise KernelError(f"listen for RoCE at {address}", error.errno or 0) from error
        yield opened


def read_frame(listener: socket.socket) -> bytes | None:
    """Return the next frame, with an Ethernet header that says only what is behind it; None when there is none."""
    try:
        return _ETHERNET_HEADER + listener.recv(_MAX_DATAGRAM_BYTES)
    except BlockingIOError:
        return None
