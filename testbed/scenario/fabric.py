"""``fabric``: switches, hosts and the links between them, in each of the shapes there are."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag, model_validator

from testbed.scenario import kinds
from testbed.scenario.loss import LinkLoss, LostFrames
from testbed.scenario.nvlink import Nvlink
from testbed.scenario.ranges import MAX_HOSTS, MAX_SWITCHES
from testbed.scenario.section import Section, derived_key, key, list_key
from testbed.scenario.switch import Switch

_RATE = kinds.rate(10**6, 1_600 * 10**9)
_DELAY = kinds.time(0, 10**9)
_FRACTION = kinds.fraction(Fraction(1))


class FabricKind(StrEnum):
    """Shape of the fabric."""

    STAR = "star"
    CLOS = "clos"
    ZONES = "zones"


_FABRIC_KIND = kinds.choice(FabricKind)
_HOSTS_PER_LEAF = kinds.integers_or(
    kinds.integer(1, MAX_HOSTS),
    1,
    MAX_HOSTS,
    MAX_SWITCHES,
    f"must be an integer from 1 to {MAX_HOSTS}, or a list of one such integer per leaf",
)


class Link(Section):
    """One class of links, alike in both directions."""

    rate_bits_per_s: Annotated[int, _RATE] = key("rate", "Rate of each direction.", example="400 Gbit/s")
    delay_ns: Annotated[int, _DELAY] = key("delay", "One-way propagation delay.", default="600 ns")
    loss_fraction: Annotated[Fraction, _FRACTION] = key(
        "loss", "Share of the frames that each of these links loses at random, in either direction.", default="0"
    )


class Uplink(Link):
    """The links between leaves and spines; rate and delay are as on the host links where they are not given."""

    rate_bits_per_s: Annotated[int, _RATE] = derived_key("rate", "Rate of each direction. Default: the host links'.")
    delay_ns: Annotated[int, _DELAY] = derived_key("delay", "One-way propagation delay. Default: the host links'.")


class _Fabric(Section):
    """What every shape of fabric has."""

    host_link: Link = key("host_link", "The link between a host's NIC and its leaf.", example={"rate": "400 Gbit/s"})
    switch: Switch = key("switch", "The switches.", default={})
    spine_switch: Switch = derived_key("spine_switch", "The spines, where they differ. Default: as `switch`.")
    lossy_links: tuple[LinkLoss, ...] = list_key(
        "lossy_links",
        "Links that lose another share of their frames than their kind does, in either direction.",
        example=[{"link": "leaf0:spine1", "fraction": "1/1000"}],
    )
    lost_frames: Annotated[LostFrames, kinds.choice(LostFrames)] = key(
        "lost_frames",
        "What lossy links lose: all frames, as a bad cable does, or data alone (no ACK, NAK or CNP).",
        default="all",
    )
    nics_per_host: Annotated[int, kinds.integer(1, 16)] = key(
        "nics_per_host", "NICs, hence rails, of one host, each with a link to the host's leaf.", default=1
    )
    gpus_per_host: Annotated[int, kinds.integer(1, 16)] = key(
        "gpus_per_host",
        "GPUs, hence ranks, of one host: a multiple of nics_per_host. Ranks are numbered host by host, and share their "
        "host's NICs evenly and in order. Those of one host talk over NVLink.",
        default=1,
    )
    nvlink: Nvlink = key("nvlink", "What joins the GPUs of a host: a model, no packets.", default={})

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        raise NotImplementedError

    @property
    def nhosts(self) -> int:
        """Hosts of the whole fabric."""
        return sum(self.host_counts)

    @property
    def nranks(self) -> int:
        """Ranks of the whole fabric."""
        return self.nhosts * self.gpus_per_host

    @property
    def rank_counts(self) -> tuple[int, ...]:
        """Ranks under each leaf."""
        return tuple(hosts * self.gpus_per_host for hosts in self.host_counts)

    @model_validator(mode="before")
    @classmethod
    def _fill_spine_switch(cls, data: Any) -> Any:
        """Let spines be as the other switches unless they are given."""
        return _with_spine_switch(data)


def _with_spine_switch(data: Any) -> Any:
    return {"spine_switch": data.get("switch", {}), **data} if isinstance(data, Mapping) else data


def _with_uplink(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    host_link, uplink = data.get("host_link"), data.get("uplink", {})
    if not isinstance(host_link, Mapping) or not isinstance(uplink, Mapping):
        return data
    default_delay = Link.model_fields["delay_ns"].default
    inherited = {"rate": host_link.get("rate"), "delay": host_link.get("delay", default_delay)}
    return {**data, "uplink": {**inherited, **uplink}}


class StarFabric(_Fabric):
    """Hosts on one switch, which is named ``switch0``."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "star")] = key(
        "kind", "Shape of the fabric: star.", example="star"
    )
    hosts_per_leaf: Annotated[int, kinds.integer(1, MAX_HOSTS)] = key(
        "hosts_per_leaf", "Hosts on the one switch.", example=2
    )

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        return (self.hosts_per_leaf,)


class ClosFabric(_Fabric):
    """Leaves, each joined to every spine by one uplink."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "clos")] = key(
        "kind", "Shape of the fabric: clos.", example="clos"
    )
    leaves: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = key("leaves", "Number of leaf switches.", example=2)
    spines: Annotated[int, kinds.integer(0, MAX_SWITCHES)] = key(
        "spines", "Number of spine switches; 0 only with a single leaf.", example=1
    )
    hosts_per_leaf: Annotated[int | tuple[int, ...], _HOSTS_PER_LEAF] = key(
        "hosts_per_leaf", "Hosts under every leaf, or a list with the number under each.", example=1
    )
    uplink: Uplink = derived_key("uplink", "The link between a leaf and a spine. Default: as the host links.")

    @model_validator(mode="before")
    @classmethod
    def _fill_uplink(cls, data: Any) -> Any:
        """Fill in what the uplink takes over from the host link."""
        return _with_uplink(data)

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf."""
        if isinstance(self.hosts_per_leaf, tuple):
            return self.hosts_per_leaf
        return (self.hosts_per_leaf,) * self.leaves


class ZonesFabric(ClosFabric):
    """Zones, each with leaves and spines of its own, whose spines are joined by superspines."""

    kind: Annotated[FabricKind, kinds.only(_FABRIC_KIND, "zones")] = key(
        "kind", "Shape of the fabric: zones.", example="zones"
    )
    zones: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = key("zones", "Number of zones.", example=2)
    leaves: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = key("leaves", "Leaf switches of each zone.", example=2)
    spines: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = key("spines", "Spine switches of each zone.", example=1)
    superspines: Annotated[int, kinds.integer(1, MAX_SWITCHES)] = key(
        "superspines", "Superspines, which join the zones.", example=1
    )
    hosts_per_leaf: Annotated[int | tuple[int, ...], _HOSTS_PER_LEAF] = key(
        "hosts_per_leaf", "Hosts under every leaf, or a list with the number under each, zone by zone.", example=1
    )
    superspine_link: Uplink = derived_key(
        "superspine_link",
        "The link between a spine and a superspine. Zones are oversubscribed by leaves x uplink rate to superspines x this rate: "
        "what a spine can get from its leaves to what it can send to other zones. Default: as `uplink`.",
    )
    superspine_switch: Switch = derived_key(
        "superspine_switch", "The superspines, where they differ. Default: as `spine_switch`."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_superspines(cls, data: Any) -> Any:
        """Let superspines and their links be as spines and uplinks unless they are given."""
        if not isinstance(data, Mapping):
            return data
        filled = _with_uplink(_with_spine_switch(data))
        filled = {"superspine_switch": filled.get("spine_switch"), **filled}
        uplink, given = filled.get("uplink"), filled.get("superspine_link", {})
        if isinstance(uplink, Mapping) and isinstance(given, Mapping):
            inherited = {key: uplink[key] for key in ("rate", "delay") if uplink.get(key) is not None}
            filled["superspine_link"] = {**inherited, **given}
        return filled

    @property
    def oversubscription(self) -> Fraction:
        """What a spine can get from its leaves over what it can send to other zones."""
        return Fraction(
            self.leaves * self.uplink.rate_bits_per_s, self.superspines * self.superspine_link.rate_bits_per_s
        )

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Hosts under each leaf, zone by zone."""
        if isinstance(self.hosts_per_leaf, tuple):
            return self.hosts_per_leaf
        return (self.hosts_per_leaf,) * (self.zones * self.leaves)


def _select_fabric(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, Mapping) else getattr(data, "kind", None)
    return f"<{kind}>" if kind in ("star", "zones") else "<clos>"


Fabric: TypeAlias = Annotated[
    Annotated[ClosFabric, Tag("<clos>")]
    | Annotated[StarFabric, Tag("<star>")]
    | Annotated[ZonesFabric, Tag("<zones>")],
    Discriminator(_select_fabric),
]
