"""A routing scheme as a newcomer writes it: one file, dropped into a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import testbed

SOURCE = '''"""Mirror: a destination is reached by the last uplinks first."""

from testbed.routing.protocol import NO_SETTINGS, RoutingSettings
from testbed.routing.tables import ForwardingTables, TablesBuilder, filled_slots, route_downwards, single_member
from testbed.topology import Topology


class Mirror:
    """Pins each destination to an uplink, counted from the last."""

    name = "mirror"
    summary = "pins each destination to an uplink, the last first"

    def build_tables(
        self, topology: Topology, *, hash_seed: int, settings: RoutingSettings = NO_SETTINGS
    ) -> ForwardingTables:
        builder = TablesBuilder(topology)
        route_downwards(builder, topology)
        for leaf in topology.leaves:
            groups = [single_member(port.id) for port in reversed(topology.uplinks(leaf))]
            for other in topology.leaves:
                for slot in filled_slots(topology, other) if other is not leaf else ():
                    builder.route(leaf.index, slot, groups[slot % topology.slot_stride % len(groups)])
        return builder.build()


SCHEME = Mirror()
'''


def copy_package(folder: Path, **schemes: str) -> Path:
    """Copy the package into a folder and add routing schemes to it, the text of each by its module's name."""
    ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.h")
    shutil.copytree(Path(testbed.__file__).parent, folder / "testbed", ignore=ignored)
    for module, text in schemes.items():
        (folder / "testbed" / "routing" / f"{module}.py").write_text(text)
    return folder


def run_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a copied package."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "testbed", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
