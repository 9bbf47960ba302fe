"""What stands for what in an application's command lines, and the program by which its processes reach other hosts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.scenario import PLACEHOLDER


@dataclass(frozen=True, slots=True)
class NicNames:
    """How programs call a NIC.

    Attributes:
        address: IPv4 address.
        ifname: Interface.
        device: Soft-RoCE device; empty without one.
        gid_index: Index of the device's RoCEv2 GID.
    """

    address: str
    ifname: str
    device: str = ""
    gid_index: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """What placeholders stand for.

    Attributes:
        nics: NICs of each host.
        names: Names of the hosts.
        folder: The item's folder.
        hostfile: File with the hosts' names.
        rsh: Program that runs a command on a host.
        traffic_class: TOS byte of the lossless priority's data.
    """

    nics: Sequence[Sequence[NicNames]]
    names: Sequence[str]
    folder: Path
    hostfile: Path
    rsh: Path
    traffic_class: int

    def fill(self, text: str, host: int | None, *, shell: bool) -> str:
        """Return a text with its placeholders filled in.

        Args:
            text: The text; other braces stay as they are.
            host: Number of the host for which; None for none.
            shell: Whether it is a command line, in which paths are quoted.
        """

        def path(one: Path) -> str:
            return shlex.quote(str(one)) if shell else str(one)

        common: Mapping[str, str] = {
            "folder": path(self.folder),
            "hostfile": path(self.hostfile),
            "rsh": path(self.rsh),
            "hosts": ",".join(self.names),
            "addresses": ",".join(nics[0].address for nics in self.nics),
            "host": str(host),
            "traffic_class": str(self.traffic_class),
        }

        def value(name: str, of_host: str | None, nic: str | None) -> str:
            if name in common:
                return common[name]
            number = int(of_host) if of_host is not None else host
            assert number is not None
            return str(getattr(self.nics[number][int(nic or 0)], name))

        return PLACEHOLDER.sub(lambda found: value(*found.groups()), text)


def render_rsh(places: Places, namespaces: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a shell script that is called like rsh: ``rsh HOST COMMAND…`` runs the command in the host's network namespace.

    Args:
        places: The hosts; each may be called by its name or by an address.
        namespaces: Their network namespaces.
        environment: What to set for the command, not filled in.
    """
    cases = []
    for host, (name, netns) in enumerate(zip(places.names, namespaces, strict=True)):
        called = "|".join([name, *(nic.address for nic in places.nics[host])])
        settings = "".join(
            f"    export {variable}={shlex.quote(places.fill(text, host, shell=False))}\n"
            for variable, text in environment.items()
        )
        cases.append(f"{called})\n    netns={shlex.quote(netns)}\n{settings}    ;;\n")
    return (
        "#!/bin/sh\n"
        "# HOST COMMAND...: run the command on a host of the fabric. Options such as -n are not needed here.\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'
        "host=$1\nshift\n"
        "case $host in\n"
        f"{''.join(cases)}"
        '*) echo "there is no host $host" >&2; exit 255 ;;\n'
        "esac\n"
        'exec nsenter --net="/run/netns/$netns" sh -c "$*"\n'
    )
