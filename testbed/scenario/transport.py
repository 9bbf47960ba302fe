"""``transport``: RoCEv2 as NICs and the collective library set it up."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from testbed.scenario import kinds
from testbed.scenario.congestion import CongestionControl, Dcqcn, Timely, congestion_parameters
from testbed.scenario.ranges import SIZE
from testbed.scenario.section import Section, key

_TIMEOUT = kinds.auto_or(kinds.time(1, 10 * 10**9))
_PRIORITY = kinds.integer(0, 7)


class Carrier(StrEnum):
    """What carries the bytes."""

    ENGINE = "engine"
    RXE = "rxe"
    TCP = "tcp"


class LinkDelay(StrEnum):
    """What delays the bytes by the propagation of their links."""

    AUTO = "auto"
    CARRIER = "carrier"
    NETEM = "netem"


class QpStrategy(StrEnum):
    """How a message is spread over the QPs of its connection."""

    SPLIT = "split"
    ROUND_ROBIN = "round_robin"
    DYNAMIC = "dynamic"


class UdpSourcePort(StrEnum):
    """What gets a UDP source port, and so path entropy, of its own."""

    PER_PAIR = "per_pair"
    PER_QP = "per_qp"


class LossRecovery(StrEnum):
    """What a NIC resends after a loss."""

    GO_BACK_N = "go_back_n"
    SELECTIVE = "selective"


class AdmissionScheme(StrEnum):
    """What a sender must be granted before it sends."""

    NONE = "none"
    CTS = "cts"


class Admission(Section):
    """Receiver-driven admission."""

    scheme: Annotated[AdmissionScheme, kinds.choice(AdmissionScheme)] = key(
        "scheme",
        "Admission scheme: none, or cts: a sender writes only what clear-to-send frames of its receiver have granted. The "
        "other keys are cts's.",
        default="none",
    )
    channels: Annotated[int, kinds.integer(1, 64)] = key(
        "channels", "Channels between two ranks: their buffers together are the window W.", default=1
    )
    channel_buffer_bytes: Annotated[int, SIZE] = key(
        "channel_buffer", "Receive buffer of one channel; NCCL's is 4 MiB.", default="4 MiB"
    )
    grants: Annotated[int, kinds.integer(1, 1024)] = key(
        "grants",
        "Pieces in which the window W is granted, of a full packet or more each; a piece is granted anew when what it "
        "covered has arrived. NCCL has 8.",
        default=8,
    )
    priority: Annotated[int | None, _PRIORITY] = key(
        "priority",
        "Priority of CTS frames: 6 and 7 have the control queue, all others wait in the data's. Default: the data's "
        "priority, as in a network without a class for them.",
        default=None,
    )

    @property
    def window_bytes(self) -> int:
        """Payload that a connection may have sent and not arrived."""
        return self.channels * self.channel_buffer_bytes


class Transport(Section):
    """RoCEv2 as NICs and the collective library set it up."""

    carrier: Annotated[Carrier, kinds.choice(Carrier)] = key("carrier", "What carries the bytes.", default="engine")
    link_delay: Annotated[LinkDelay, kinds.choice(LinkDelay)] = key(
        "link_delay",
        "What delays by the propagation of links: netem, the qdisc, every frame at every port, for carriers rxe and tcp; "
        "carrier, whoever sends, and then an acknowledgement of the kernel's comes back without it. auto: netem with those "
        "carriers where this kernel has it and a link has a delay.",
        default="auto",
    )
    mtu_bytes: Annotated[int, kinds.one_of((256, 512, 1024, 2048, 4096))] = key(
        "mtu", "RDMA payload of a full frame, in bytes.", default=4096
    )
    qps_per_connection: Annotated[int, kinds.integer(1, 32)] = key(
        "qps_per_connection", "Queue pairs between two ranks.", default=1
    )
    qp_strategy: Annotated[QpStrategy, kinds.choice(QpStrategy)] = key(
        "qp_strategy", "How a message is spread over the queue pairs.", default="split"
    )
    udp_source_port: Annotated[UdpSourcePort, kinds.choice(UdpSourcePort)] = key(
        "udp_source_port", "What has a UDP source port of its own.", default="per_qp"
    )
    loss_recovery: Annotated[LossRecovery, kinds.choice(LossRecovery)] = key(
        "loss_recovery",
        "What is resent after a loss: go_back_n everything from the first missing packet on; selective what is missing alone, "
        "to a receiver that takes packets out of order.",
        default="go_back_n",
    )
    reorder_time_ns: Annotated[int | None, _TIMEOUT] = key(
        "reorder_time",
        "Under selective: how long after a later packet's SACK a packet may still come before it counts as lost; auto: the "
        "round trip of the idle path, four where packets are spread over several, and four of the engine's ticks.",
        default="auto",
    )
    retransmit_timeout_ns: Annotated[int | None, _TIMEOUT] = key(
        "retransmit_timeout",
        "Time without an ACK after which all is resent; auto follows from path and rate.",
        default="auto",
    )
    congestion_control: Annotated[CongestionControl, kinds.choice(CongestionControl)] = key(
        "congestion_control", "What slows senders down; with carrier rxe none or dcqcn, with tcp none.", default="none"
    )
    dcqcn: Dcqcn | None = key("dcqcn", "Parameters of dcqcn.", default=None)
    timely: Timely | None = key("timely", "Parameters of timely.", default=None)
    admission: Admission = key("admission", "What senders must be granted.", default={})

    @property
    def congestion_parameters(self) -> dict[str, Any]:
        """What `testbed.roce.congestion.make` takes as parameters of the congestion control that is chosen."""
        return congestion_parameters(getattr(self, str(self.congestion_control), None))
