"""A running fabric: apply a plan, look at it, remove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.fabric.apply import egress_of, ifindex_of
    from testbed.fabric.fabric import Fabric
    from testbed.fabric.inspect import Lab, LabDirection, LabLink, LabLinkEnd, LabNode, read_lab

__all__ = ["Fabric", "Lab", "LabDirection", "LabLink", "LabLinkEnd", "LabNode", "egress_of", "ifindex_of", "read_lab"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: a lab is removed without what it takes to plan one."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    homes = {"Fabric": "fabric", "egress_of": "apply", "ifindex_of": "apply"}
    return getattr(importlib.import_module(f"testbed.fabric.{homes.get(name, 'inspect')}"), name)
