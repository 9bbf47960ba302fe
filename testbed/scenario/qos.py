"""Priorities, marking and pausing in the scenario."""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.ranges import FLAG, SIZE
from testbed.scenario.section import Section, key, list_key

_FRACTION = kinds.fraction(Fraction(1))
_TIME = kinds.time(1, 3600 * 10**9)
# 6 and 7 are those of CNP, ACK and network control, which have a queue of their own.
_DATA_PRIORITY = kinds.integer(0, 5)


class EcnPreset(StrEnum):
    """Where the thresholds come from that a scenario does not give."""

    HPCC = "hpcc"
    SIMAI = "simai"
    DCQCN = "dcqcn"


class WatchdogAction(StrEnum):
    """What becomes of the frames of a queue that was paused for too long."""

    DROP = "drop"
    FORWARD = "forward"


class GateChoice(StrEnum):
    """What holds a paused queue back."""

    AUTO = "auto"
    TBF = "tbf"
    PLUG = "plug"


class MarkerChoice(StrEnum):
    """What marks CE."""

    AUTO = "auto"
    BPF = "bpf"
    RED = "red"


class SchedulerChoice(StrEnum):
    """What shares a port's rate among several priorities."""

    AUTO = "auto"
    HTB = "htb"
    ETS = "ets"
    PRIO = "prio"


class Ecn(Section):
    """Marking by switches, on the instantaneous depth of an egress queue."""

    enabled: Annotated[bool, FLAG] = key("enabled", "Whether switches mark CE.", default=False)
    preset: Annotated[EcnPreset, kinds.choice(EcnPreset)] = key(
        "preset",
        "Thresholds that are not given, scaled with the port's rate: hpcc (kmin 100 KB per 25 Gbit/s, kmax 4 kmin, pmax 0.2), "
        "simai (800/3200 KB at 400 Gbit/s, 0.2), dcqcn (5/200 KB at 40 Gbit/s, 0.01).",
        default="hpcc",
    )
    kmin_bytes: Annotated[int | None, kinds.auto_or(SIZE)] = key(
        "kmin", "Depth up to which nothing is marked, the same at every port.", default="auto"
    )
    kmax_bytes: Annotated[int | None, kinds.auto_or(SIZE)] = key(
        "kmax", "Depth above which everything is marked, the same at every port.", default="auto"
    )
    pmax: Annotated[Fraction | None, kinds.auto_or(_FRACTION)] = key(
        "pmax", "Probability of a mark at kmax.", default="auto"
    )
    marker: Annotated[MarkerChoice, kinds.choice(MarkerChoice)] = key(
        "marker",
        "What marks: bpf, the fabric's own program, exact on every kernel; red, the kernel's qdisc, for comparison. auto: bpf.",
        default="auto",
    )


class Watchdog(Section):
    """The PFC watchdog; defaults are SONiC's."""

    enabled: Annotated[bool, FLAG] = key(
        "enabled", "Whether a queue that was paused for too long is released.", default=False
    )
    detect_ns: Annotated[int, _TIME] = key("detect", "Pause after which it steps in.", default="200 ms")
    restore_ns: Annotated[int, _TIME] = key(
        "restore", "Time without a pause frame after which the queue obeys again.", default="200 ms"
    )
    action: Annotated[WatchdogAction, kinds.choice(WatchdogAction)] = key(
        "action", "What becomes of the queue's frames meanwhile.", default="drop"
    )


class Pfc(Section):
    """Priority flow control, per ingress port and priority."""

    enabled: Annotated[bool, FLAG] = key("enabled", "Whether switches pause their neighbours.", default=False)
    xoff_bytes: Annotated[int | None, kinds.auto_or(SIZE)] = key(
        "xoff",
        "Ingress bytes above which to pause; auto: the switch's alpha or port_buffer decides.",
        default="auto",
    )
    xon_bytes: Annotated[int | None, kinds.auto_or(SIZE)] = key(
        "xon",
        "Ingress bytes below which to resume, where xoff is given; auto: as far below xoff as reaction times ask for.",
        default="auto",
    )
    headroom_bytes: Annotated[int | None, kinds.auto_or(SIZE)] = key(
        "headroom",
        "Buffer kept per ingress port for what arrives after a pause was sent; auto: what delays and this machine's "
        "reaction time ask for.",
        default="auto",
    )
    gate: Annotated[GateChoice, kinds.choice(GateChoice)] = key(
        "gate",
        "What holds a paused queue back: tbf, its shaper turned down to a crawl, on every kernel; plug, the qdisc made for it. "
        "auto: plug where this kernel has it and dcqcn does not slow rxe down.",
        default="auto",
    )
    watchdog: Watchdog = key("watchdog", "Release of queues that stay paused.", default={})


class DataPriority(Section):
    """A priority that carries data, with queues of its own at every port."""

    priority: Annotated[int, _DATA_PRIORITY] = key("priority", "The priority.", example=4)
    lossless: Annotated[bool, FLAG] = key(
        "lossless", "Whether PFC covers it, where qos.pfc is enabled; else what does not fit is dropped.", default=True
    )
    weight: Annotated[int | None, kinds.word_or("strict", kinds.integer(1, 64))] = key(
        "weight",
        "Its share of a link that several priorities fill, beside the others' weights. strict: it goes before all that have a "
        "weight; of several strict priorities the higher number goes first.",
        default=1,
    )

    @property
    def is_strict(self) -> bool:
        """Whether it goes before all priorities that have a weight."""
        return self.weight is None


class Qos(Section):
    """Priorities, marking and pausing."""

    lossless_priority: Annotated[int, _DATA_PRIORITY] = key(
        "lossless_priority",
        "Priority of RoCE data whose workload names no other, 0 to 5; its DSCP is eight times this, and two more.",
        default=3,
    )
    priorities: tuple[DataPriority, ...] = list_key(
        "priorities",
        "Further priorities that workloads may choose, lossless or lossy; lossless_priority may stand among them to get a "
        "weight. With more than one, ports have a queue for each; strict ones go first, the others share what is left by weight.",
        example=[{"priority": 5, "weight": "strict"}, {"priority": 0, "lossless": False, "weight": 2}],
    )
    scheduler: Annotated[SchedulerChoice, kinds.choice(SchedulerChoice)] = key(
        "scheduler",
        "What shares a port's rate among several priorities: htb, on every kernel; ets, the qdisc of IEEE 802.1Qaz, where none "
        "is paused of several that have a weight; prio, where all are strict. auto: prio where all are strict, nothing is paused "
        "and this kernel has it, else htb.",
        default="auto",
    )
    ecn: Ecn = key("ecn", "Explicit congestion notification.", default={})
    pfc: Pfc = key("pfc", "Priority flow control.", default={})

    @property
    def data_priorities(self) -> tuple[DataPriority, ...]:
        """All priorities that carry data, `lossless_priority` among them, ascending."""
        given = {one.priority: one for one in self.priorities}
        given.setdefault(self.lossless_priority, DataPriority(priority=self.lossless_priority))
        return tuple(given[number] for number in sorted(given))

    @property
    def served_priorities(self) -> tuple[DataPriority, ...]:
        """The same in the order in which a port serves them: strict ones, then those with a weight; higher numbers first."""
        return tuple(sorted(self.data_priorities, key=lambda one: (not one.is_strict, -one.priority)))

    @property
    def paused_priorities(self) -> tuple[int, ...]:
        """The priorities that PFC covers, ascending; none where it is not enabled."""
        return tuple(one.priority for one in self.data_priorities if one.lossless) if self.pfc.enabled else ()
