"""A reliable connection's responder that keeps what it gets: a state machine without clock or socket.

The fabric's own responder, in eBPF, counts payload and lets it go. This one is for talking to RoCE that is not ours, where the
bytes themselves are the proof: it takes SEND and WRITE packets, stores them, and says what is to be answered.

Source:
    InfiniBand Architecture Specification, volume 1: 9.7.4.1 (responder validation of PSN and opcode sequence), 9.7.5.1
    (acknowledgement of duplicates), 9.7.5.2 (NAK codes, RNR NAK), 9.9.3 (responder errors).
    Linux drivers/infiniband/sw/rxe/rxe_opcode.c, RXE_RWR_MASK (which packets take a receive buffer).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import IntEnum

from testbed.roce.packet import FrameError, RocePacket, parse_packet, render_answer
from testbed.roce.queue_pairs import QueuePair
from testbed.roce.wire import ACK_SYNDROME, NAK_SEQUENCE_ERROR_SYNDROME, PSN_MASK, Opcode

_AHEAD_PACKETS = 1 << 23
"""PSNs less than this beyond the expected one are to come, the others were."""
_PKEY_MASK = 0x7FFF
_MAX_MESSAGE_BYTES = 1 << 31

_FIRST = frozenset({Opcode.SEND_FIRST, Opcode.WRITE_FIRST})
_MIDDLE = frozenset({Opcode.SEND_MIDDLE, Opcode.WRITE_MIDDLE})
_LAST = frozenset(
    {
        Opcode.SEND_LAST,
        Opcode.SEND_LAST_WITH_IMMEDIATE,
        Opcode.WRITE_LAST,
        Opcode.WRITE_LAST_WITH_IMMEDIATE,
    }
)
_ONLY = frozenset(
    {
        Opcode.SEND_ONLY,
        Opcode.SEND_ONLY_WITH_IMMEDIATE,
        Opcode.WRITE_ONLY,
        Opcode.WRITE_ONLY_WITH_IMMEDIATE,
    }
)
_WRITES_WITH_IMMEDIATE = frozenset({Opcode.WRITE_LAST_WITH_IMMEDIATE, Opcode.WRITE_ONLY_WITH_IMMEDIATE})
_SENDS = frozenset(
    {
        Opcode.SEND_FIRST,
        Opcode.SEND_MIDDLE,
        Opcode.SEND_LAST,
        Opcode.SEND_LAST_WITH_IMMEDIATE,
        Opcode.SEND_ONLY,
        Opcode.SEND_ONLY_WITH_IMMEDIATE,
    }
)


class Syndrome(IntEnum):
    """AETH syndromes that this responder sends; the low five bits of RNR are the requester's delay."""

    ACK = ACK_SYNDROME
    RNR = 0x20
    SEQUENCE_ERROR = NAK_SEQUENCE_ERROR_SYNDROME
    INVALID_REQUEST = 0x61
    REMOTE_ACCESS_ERROR = 0x62


@dataclass(frozen=True, slots=True)
class Answer:
    """What an AETH says back: a PSN, the messages completed, and a syndrome."""

    psn: int
    msn: int
    syndrome: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that is whole.

    Attributes:
        is_send: Whether a SEND, which filled a receive buffer; else a WRITE, which took one if it has immediate data.
        nbytes: Its length.
        immediate: Immediate data; None without.
    """

    is_send: bool
    nbytes: int
    immediate: int | None


@dataclass(slots=True)
class _Message:
    """The message that is coming in."""

    is_send: bool
    place: memoryview
    nbytes: int = 0


class _RefusedError(Exception):
    """The packet that was due cannot be executed."""

    def __init__(self, syndrome: int) -> None:
        super().__init__(syndrome)
        self.syndrome = syndrome


class StoreResponder:
    """Takes the packets of one connection in order and stores their payload.

    A gap is answered with one NAK, and with another when PSNs of the gap come again with it still open, as the fabric's responder
    does. A NAK for anything but the sequence ends the connection, as a QP in its error state: nothing is answered any more.

    Args:
        mtu: Payload of a full packet, bytes.
        first_psn: PSN of the first packet.
        memory: What WRITEs may fill.
        virtual_address: Where a requester thinks it begins.
        rkey: Its key.
        rnr_timer: The delay that what finds no receive buffer is told, 0 to 31.

    Attributes:
        arrivals: Messages that are whole, in order.
        counts: What was seen and answered: ``in_order``, ``duplicate``, ``out_of_order``, ``dropped``, ``acks``, ``naks``,
            ``rnr_naks``.
        failed: The syndrome that ended the connection; None while it lives.
    """

    def __init__(
        self, *, mtu: int, first_psn: int, memory: bytearray, virtual_address: int, rkey: int, rnr_timer: int = 12
    ) -> None:
        self._mtu = mtu
        self._memory = memoryview(memory)
        self._virtual_address, self._rkey = virtual_address, rkey
        self._rnr_syndrome = Syndrome.RNR | rnr_timer
        self._expected = first_psn & PSN_MASK
        self._msn = 0
        self._message: _Message | None = None
        self._receives: deque[memoryview] = deque()
        # While a gap has its NAK: how far beyond it the latest packet was.
        self._told_ahead: int | None = None
        self.arrivals: list[Arrival] = []
        self.counts: Counter[str] = Counter()
        self.failed: int | None = None

    def post_receive(self, place: bytearray) -> None:
        """Give one more SEND a place, or let one more WRITE with immediate data complete; the latter leaves it empty."""
        self._receives.append(memoryview(place))

    def receive(self, packet: RocePacket) -> Answer | None:
        """Take a packet of this connection and return what is to be answered, if anything."""
        if self.failed is not None or packet.pkey & _PKEY_MASK != _PKEY_MASK or packet.opcode == Opcode.CNP:
            self.counts["dropped"] += 1
            return None
        ahead = (packet.psn - self._expected) & PSN_MASK
        if ahead >= _AHEAD_PACKETS:
            return self._receive_duplicate(packet)
        if ahead:
            return self._receive_early(ahead)
        try:
            self._execute(packet)
        except _RefusedError as refused:
            return self._refuse(refused.syndrome)
        self._told_ahead = None
        self._expected = (self._expected + 1) & PSN_MASK
        self.counts["in_order"] += 1
        return self._acknowledge(packet.psn) if packet.ack_request else None

    def _receive_duplicate(self, packet: RocePacket) -> Answer | None:
        self.counts["duplicate"] += 1
        self._told_ahead = None
        # Told the latest: the ACK before may have been lost.
        return self._acknowledge(self._expected - 1) if packet.ack_request else None

    def _receive_early(self, ahead: int) -> Answer | None:
        self.counts["out_of_order"] += 1
        told, self._told_ahead = self._told_ahead, ahead
        if told is not None and ahead > told:
            return None
        self.counts["naks"] += 1
        return Answer(self._expected, self._msn, Syndrome.SEQUENCE_ERROR)

    def _acknowledge(self, psn: int) -> Answer:
        self.counts["acks"] += 1
        return Answer(psn & PSN_MASK, self._msn, Syndrome.ACK)

    def _refuse(self, syndrome: int) -> Answer:
        if syndrome == self._rnr_syndrome:
            self.counts["rnr_naks"] += 1
            self._told_ahead = 0  # what is behind it will come again
        else:
            self.counts["naks"] += 1
            self.failed = syndrome
        return Answer(self._expected, self._msn, syndrome)

    def _execute(self, packet: RocePacket) -> None:
        """Do what the packet that was due asks for; the message's state changes only where that is allowed."""
        opcode = packet.opcode
        is_send, size = opcode in _SENDS, len(packet.payload)
        begins, ends = opcode in _FIRST or opcode in _ONLY, opcode in _LAST or opcode in _ONLY
        if not begins and not ends and opcode not in _MIDDLE:
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        # FIRST and ONLY where no message is under way, all others within one of their kind.
        message = self._message
        if begins != (message is None) or (message is not None and message.is_send != is_send):
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        if size > self._mtu or (not ends and size != self._mtu) or (opcode in _LAST and not size):
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        takes_receive = begins if is_send else opcode in _WRITES_WITH_IMMEDIATE
        if takes_receive and not self._receives:
            raise _RefusedError(self._rnr_syndrome)
        if message is None:
            message = self._begin(packet, is_send)
        if message.nbytes + size > len(message.place):
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        if ends and not is_send and message.nbytes + size != len(message.place):
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        if takes_receive:
            self._receives.popleft()
        message.place[message.nbytes : message.nbytes + size] = packet.payload
        message.nbytes += size
        self._message = None if ends else message
        if ends:
            self._msn = (self._msn + 1) & PSN_MASK
            self.arrivals.append(Arrival(is_send, message.nbytes, packet.immediate))

    def _begin(self, packet: RocePacket, is_send: bool) -> _Message:
        if is_send:
            return _Message(True, self._receives[0])
        nbytes = packet.dma_bytes
        if nbytes > _MAX_MESSAGE_BYTES:
            raise _RefusedError(Syndrome.INVALID_REQUEST)
        begin = packet.virtual_address - self._virtual_address
        # Without bytes neither key nor address counts.
        if nbytes and (packet.rkey != self._rkey or begin < 0 or begin + nbytes > len(self._memory)):
            raise _RefusedError(Syndrome.REMOTE_ACCESS_ERROR)
        return _Message(False, self._memory[begin : begin + nbytes] if nbytes else self._memory[:0])


class StoreQueuePair:
    """A responder with the addresses of its connection: frames in, frames out.

    Args:
        qp: This end.
        responder: What it does with packets.

    Attributes:
        bad_frames: Frames dropped because they were broken, such as by a wrong ICRC.
        foreign_frames: Frames dropped because they are not of this connection.
    """

    def __init__(self, qp: QueuePair, responder: StoreResponder) -> None:
        self.qp = qp
        self.responder = responder
        self.bad_frames = 0
        self.foreign_frames = 0

    def receive(self, frame: bytes) -> bytes | None:
        """Take a frame from the wire and return the frame that answers it, if any does."""
        try:
            packet = parse_packet(frame)
        except FrameError:
            self.bad_frames += 1
            return None
        qp = self.qp
        ends = packet.src_address, packet.dst_address, packet.dest_qp
        if ends != (qp.remote.address, qp.local.address, qp.qpn) or packet.syndrome is not None:
            self.foreign_frames += 1
            return None
        answer = self.responder.receive(packet)
        if answer is None:
            return None
        return render_answer(qp, psn=answer.psn, msn=answer.msn, syndrome=answer.syndrome)
