"""The switches' packet memory in the scenario, and what stands for well-known ones."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any

from pydantic import model_validator

from testbed.scenario import kinds
from testbed.scenario.section import Section, key

_SIZE = kinds.size(1, 16 * 2**30)
_SHARE = kinds.fraction(Fraction(16))


class SwitchModel(StrEnum):
    """Kinds of switches by their packet memory."""

    SHARED = "shared"
    SHALLOW = "shallow"
    DEEP = "deep"


MODELS: Mapping[SwitchModel, Mapping[str, str]] = {
    # HPCC's ns-3 model of a Broadcom chip: 32 MB shared, alpha 1/8 [source].
    SwitchModel.SHARED: {"buffer": "32 MiB", "alpha": "1/8"},
    # On-chip memory of a 12.8 Tbit/s leaf such as Broadcom's Tomahawk 3, 64 MB shared [widely quoted].
    SwitchModel.SHALLOW: {"buffer": "64 MiB", "alpha": "1/8"},
    # Off-chip memory of a spine such as Arista's 7800R3 (Jericho 2: 8 GB of HBM per 4.8 to 9.6 Tbit/s) [widely quoted].
    SwitchModel.DEEP: {"buffer": "8 GiB", "alpha": "1"},
}
"""What ``model`` fills in where a key is not given. The labels say how far a figure can be trusted, see docs/flow-control.md."""


class Switch(Section):
    """The packet memory of a switch."""

    model: Annotated[SwitchModel, kinds.choice(SwitchModel)] = key(
        "model",
        "What fills in the other keys: shared (32 MiB, alpha 1/8), shallow (a leaf of 64 MiB), deep (a spine of 8 GiB, alpha 1).",
        default="shared",
    )
    buffer_bytes: Annotated[int, _SIZE] = key(
        "buffer",
        "Packet memory of one switch, shared by all its ports. Default: the model's.",
        default="32 MiB",
    )
    alpha: Annotated[Fraction, _SHARE] = key(
        "alpha",
        "Share of the free shared memory (dynamic threshold): a lossless priority group that holds more asks its neighbour to "
        "pause. Default: the model's.",
        default="1/8",
    )
    port_buffer_bytes: Annotated[int | None, _SIZE] = key(
        "port_buffer",
        "Fixed share of each port, instead of alpha: the most that a lossy queue holds, and what a lossless priority group "
        "may hold, its headroom included.",
        default=None,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Fill in what the model of switch gives."""
        return {**_model_values(data), **data} if isinstance(data, Mapping) else data


def _model_values(data: Mapping[str, Any]) -> Mapping[str, str]:
    name = data.get("model", SwitchModel.SHARED)
    return MODELS[SwitchModel(name)] if name in [str(one) for one in SwitchModel] else {}
