"""AF_PACKET sockets that send the engine's frames, a tick's worth of a host in one system call."""

from __future__ import annotations

import ctypes
import errno
import socket

import numpy as np
import numpy.typing as npt

from testbed.errors import KernelError

IOVEC = np.dtype([("base", "u8"), ("length", "u8")])
MMSGHDR = np.dtype(
    [
        ("name", "u8"),
        ("name_length", "u4"),
        ("padding0", "u4"),
        ("iov", "u8"),
        ("iov_count", "u8"),
        ("control", "u8"),
        ("control_length", "u8"),
        ("flags", "i4"),
        ("padding1", "u4"),
        ("sent_length", "u4"),
        ("padding2", "u4"),
    ]
)
_SO_SNDBUFFORCE = 32
# Frames count against the socket until they leave the last queue, so the buffer holds a whole fabric's worth.
_SEND_BUFFER_BYTES = 0x3FFF_FFFF
_MSG_DONTWAIT = 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_sendmmsg.restype = ctypes.c_int
_TRANSIENT = (errno.EAGAIN, errno.ENOBUFS)


def open_packet_socket(ifname: str) -> socket.socket:
    """Return a send-only packet socket bound to an interface of the calling thread's namespace.

    Raises:
        KernelError: No permission, or no such interface.
    """
    try:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        opened.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        opened.bind((ifname, 0))
    except OSError as error:
        raise KernelError(f"open a packet socket on {ifname}", error.errno or 0) from error
    return opened


class FrameRing:
    """Outgoing frames of many connections: header rows in memory that the kernel reads, and a payload, shared or not.

    A slot is a header row with its ICRC in the last four bytes, three I/O vectors (header, payload, ICRC) and a message
    header that points at them. A tick copies the message headers of what it sends into one run per host.

    Args:
        slots: Number of slots.
        payload: Bytes that frames carry, from the first on: one row for all slots, or a row each, shape ``(slots, bytes)``.

    Attributes:
        headers: Shape ``(slots, 128)``, uint8; header from column 0, ICRC at 124…127.
        icrcs: The ICRC column, shape ``(slots,)``, little-endian uint32.
        header_lengths: Bytes of each slot's header, shape ``(slots,)``, uint64.
        payload_lengths: Bytes of each slot's payload with padding, shape ``(slots,)``, uint64.
    """

    ROW_BYTES = 128

    def __init__(self, slots: int, payload: npt.NDArray[np.uint8]) -> None:
        self.payload = payload
        self.headers = np.zeros((slots, self.ROW_BYTES), np.uint8)
        self.icrcs = self.headers.view("<u4")[:, 31]
        self._iovecs = np.zeros((slots, 3), IOVEC)
        header = self.headers.ctypes.data + np.arange(slots, dtype=np.uint64) * self.ROW_BYTES
        self._iovecs["base"][:, 0] = header
        rows = np.arange(slots, dtype=np.uint64) * np.uint64(payload.strides[0] if payload.ndim > 1 else 0)
        self._iovecs["base"][:, 1] = payload.ctypes.data + rows
        self._iovecs["base"][:, 2] = header + 124
        self._iovecs["length"][:, 2] = 4
        self.header_lengths = self._iovecs["length"][:, 0]
        self.payload_lengths = self._iovecs["length"][:, 1]
        messages = np.zeros(slots, MMSGHDR)
        messages["iov"] = self._iovecs.ctypes.data + np.arange(slots, dtype=np.uint64) * (3 * IOVEC.itemsize)
        messages["iov_count"] = 3
        # Message headers as rows of eight words: a gather of rows is one fast copy.
        self._messages = messages.view(np.uint64).reshape(slots, MMSGHDR.itemsize // 8)
        self._messages_address = self._messages.ctypes.data
        self._resize_batch(64)

    def _resize_batch(self, frames: int) -> None:
        self._batch = np.zeros((frames, self._messages.shape[1]), np.uint64)
        self._batch_address = self._batch.ctypes.data

    def send_slots(self, fd: int, first: int, count: int) -> int:
        """Send ``count`` consecutive slots from ``first`` and return how many frames the kernel took.

        Raises:
            KernelError: For anything but a full queue.
        """
        return _send_messages(fd, self._messages_address + first * MMSGHDR.itemsize, count)

    def line_up(self, slots: npt.NDArray[np.int64]) -> None:
        """Line up the frames of a tick, in the order of ``slots``."""
        if len(slots) > len(self._batch):
            self._resize_batch(2 * len(slots))
        np.take(self._messages, slots, axis=0, out=self._batch[: len(slots)], mode="clip")

    def send_lined_up(self, fd: int, first: int, count: int) -> int:
        """Send ``count`` of the frames lined up, from the ``first``, and return how many the kernel took.

        Raises:
            KernelError: For anything but a full queue.
        """
        return _send_messages(fd, self._batch_address + first * MMSGHDR.itemsize, count)


def _send_messages(fd: int, address: int, count: int) -> int:
    sent: int = _sendmmsg(fd, address, count, _MSG_DONTWAIT)
    if sent < 0:
        code = ctypes.get_errno()
        if code in _TRANSIENT:
            return 0
        raise KernelError("sendmmsg", code)
    return sent
