"""Rules between the keys of an application and those of its fabric."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator

from testbed.scenario.application import (
    DEVICE_PLACEHOLDERS,
    MARK_VARIABLE,
    OWN_PLACEHOLDERS,
    PLACEHOLDER,
    PLACEHOLDERS,
    ApplicationWorkload,
    CommandMode,
)
from testbed.scenario.keypath import KeyPath
from testbed.scenario.model import Scenario
from testbed.scenario.transport import Carrier
from testbed.scenario.violation import Valid, Violation

_CARRIER: KeyPath = ("transport", "carrier")
_HOSTS = (("fabric", "kind"), ("fabric", "leaves"), ("fabric", "zones"), ("fabric", "hosts_per_leaf"))
_NICS: KeyPath = ("fabric", "nics_per_host")


def check_application(
    scenario: Scenario, item: ApplicationWorkload, path: KeyPath, valid: Valid
) -> Iterator[Violation]:
    """Yield what is wrong with an application, which stands at ``path``."""
    if valid(_CARRIER) and scenario.transport.carrier is Carrier.ENGINE:
        rule = "must be rxe or tcp where there are applications: they send by the kernel"
        yield Violation(_CARRIER, rule, "use `carrier: tcp`, or rxe for programs that need verbs")
    commands = (*path, "commands")
    if valid(commands) and all(command.mode is CommandMode.SERVICE for command in item.commands):
        rule = "must have a command that ends by itself" if item.commands else "must have at least one command"
        yield Violation(commands, rule, "add {host: 0, command: ping -c 3 {address:1}}")
    for index, command in enumerate(item.commands):
        place = (*commands, index)
        if valid((*place, "host"), *_HOSTS) and command.host >= scenario.fabric.nhosts:
            yield Violation((*place, "host"), f"must be a host from 0 to {scenario.fabric.nhosts - 1}")
        for key, value in (("ready_port", command.ready_port), ("ready_output", command.ready_output)):
            if value is not None and command.mode is CommandMode.FOREGROUND and valid((*place, key), (*place, "mode")):
                yield Violation((*place, key), "goes with mode background or service: the end of others is waited for")
    names = Counter(figure.name for figure in item.figures)
    for index, figure in enumerate(item.figures):
        name = (*path, "figures", index, "name")
        if names[figure.name] > 1 and valid(name):
            yield Violation(name, "must be that of one figure alone")
    for place, text, has_host in _texts(item, path):
        if place[-2:] == ("environment", MARK_VARIABLE) and valid(place):
            rule = "must not be set: it is the mark by which all that a command starts is found and ended"
            yield Violation(place, rule, "choose another name")
        elif valid(place):
            yield from _check_placeholders(scenario, text, place, has_host, valid)


def _texts(item: ApplicationWorkload, path: KeyPath) -> Iterator[tuple[KeyPath, str, bool]]:
    """Yield every text that is filled in, where it stands, and whether it is filled in for a host."""
    for index, line in enumerate(item.setup):
        yield (*path, "setup", index), line, False
    for name, value in item.environment.items():
        yield (*path, "environment", name), value, True
    for index, command in enumerate(item.commands):
        yield (*path, "commands", index, "command"), command.command, True
        for name, value in command.environment.items():
            yield (*path, "commands", index, "environment", name), value, True


def _check_placeholders(
    scenario: Scenario, text: str, path: KeyPath, has_host: bool, valid: Valid
) -> Iterator[Violation]:
    """Yield the first placeholder of a text that cannot be filled in."""
    fabric = scenario.fabric
    for found in PLACEHOLDER.finditer(text):
        name, host, nic = found.groups()
        if name not in PLACEHOLDERS:
            near = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"known: {', '.join(PLACEHOLDERS)};"
            hint += f" {{ {found[0][1:-1]} }} stays as it is"
            yield Violation(path, f"must not have {found[0]}, which stands for nothing", hint)
        elif host is not None and name not in OWN_PLACEHOLDERS:
            yield Violation(path, f"must not have {found[0]}: {name} is no host's own", f"write {{{name}}}")
        elif host is None and name in (*OWN_PLACEHOLDERS, "host") and not has_host:
            yield Violation(path, f"must say which host's {name}: it runs on none", f"write {{{name}:0}}")
        elif name in DEVICE_PLACEHOLDERS and scenario.transport.carrier is Carrier.TCP and valid(_CARRIER):
            yield Violation(path, f"must not have {found[0]} with carrier tcp", "use `carrier: rxe`")
        elif host is not None and valid(*_HOSTS) and int(host) >= fabric.nhosts:
            yield Violation(path, f"must name a host from 0 to {fabric.nhosts - 1} in {found[0]}")
        elif nic is not None and valid(_NICS) and int(nic) >= fabric.nics_per_host:
            yield Violation(path, f"must name a NIC from 0 to {fabric.nics_per_host - 1} in {found[0]}")
        else:
            continue
        return
