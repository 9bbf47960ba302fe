"""A running fabric: apply a plan, look at it, remove it."""

from testbed.fabric.apply import egress_of, ifindex_of
from testbed.fabric.fabric import Fabric
from testbed.fabric.inspect import Lab, LabDirection, LabLink, LabLinkEnd, LabNode, read_lab

__all__ = ["Fabric", "Lab", "LabDirection", "LabLink", "LabLinkEnd", "LabNode", "egress_of", "ifindex_of", "read_lab"]
