"""Ranges of values that several sections of the file format share."""

from __future__ import annotations

from testbed.scenario import kinds

MAX_HOSTS = 32_768
"""Hosts, and ranks, of the largest fabric that can be described; what can be emulated says `testbed.plan.limits`."""
MAX_SWITCHES = 4096
"""Switches of each tier, likewise."""
GIB = 2**30
TIME = kinds.time(0, 3600 * 10**9)
SIZE = kinds.size(1, 16 * GIB)
FLAG = kinds.flag()
UINT32 = kinds.integer(0, 2**32 - 1)
