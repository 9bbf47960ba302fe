"""A running fabric: apply a plan, look at it, remove it."""

from testbed.fabric.fabric import Fabric

__all__ = ["Fabric"]
