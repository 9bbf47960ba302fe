"""Workload items that run programs as they are: on which hosts, in what order, and which figures of theirs are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from testbed.scenario import kinds
from testbed.scenario.section import Section as _Section
from testbed.scenario.section import key as _key
from testbed.scenario.section import list_key as _list_key

MAX_HOST = 32_767
MAX_COMMAND_CHARACTERS = 4096
MAX_FILE_CHARACTERS = 65_536

MARK_VARIABLE = "TESTBED_APPLICATION"
"""The environment variable that is not a scenario's to set: what programs have started is found by it."""

OWN_PLACEHOLDERS = ("address", "device", "gid_index", "ifname")
"""Those of a NIC: of the host that runs the command, or of another, ``{address:1}``, or of its NIC 2, ``{address:1/2}``."""

DEVICE_PLACEHOLDERS = ("device", "gid_index")
"""Those that only soft-RoCE has."""

COMMON_PLACEHOLDERS = ("addresses", "folder", "host", "hostfile", "hosts", "rsh", "traffic_class")
"""Those that need no NIC."""

PLACEHOLDERS = (*OWN_PLACEHOLDERS, *COMMON_PLACEHOLDERS)

PLACEHOLDER = re.compile(r"(?<!\$)\{([a-z_]+)(?::([0-9]{1,5})(?:/([0-9]{1,2}))?)?\}", re.ASCII)
"""``{name}``, ``{name:HOST}`` or ``{name:HOST/NIC}``. Other braces, ``${…}`` among them, are the shell's."""


class CommandMode(StrEnum):
    """What is waited for before the next command begins, and how this one ends."""

    FOREGROUND = "foreground"
    BACKGROUND = "background"
    SERVICE = "service"


class FigureKind(StrEnum):
    """What a figure is to time dilation: programs see this machine's clock."""

    NUMBER = "number"
    RATE = "rate"
    TIME = "time"


_COMMAND = kinds.text(
    MAX_COMMAND_CHARACTERS, r"(?s)\s*\S.*", f"must be a command of at most {MAX_COMMAND_CHARACTERS} characters"
)
_NAME = kinds.text(40, r"[A-Za-z][A-Za-z0-9_.-]*", "must be a name of letters, digits, dots, dashes, at most 40 long")
_FIGURE_NAME = kinds.text(40, r"[a-z][a-z0-9_]*", "must be a name of a-z, 0-9 and _, at most 40 long")
_VARIABLES = kinds.texts(r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name", MAX_COMMAND_CHARACTERS)
_FILES = kinds.texts(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "a file's name", MAX_FILE_CHARACTERS)
_WALL_TIMEOUT = kinds.time(10**9, 3600 * 10**9)


class Command(_Section):
    """One program on one host."""

    host: Annotated[int, kinds.integer(0, MAX_HOST)] = _key(
        "host", "Number of the host in whose network namespace it runs.", example=0
    )
    command: Annotated[str, _COMMAND] = _key(
        "command",
        "The shell's command line. `{address}`, `{device}`, `{gid_index}` and `{ifname}` are those of the host's first NIC, with "
        "`{address:1}` of host 1, with `{address:1/2}` of its NIC 2; `{host}` its number; `{hosts}` all hosts' names and "
        "`{addresses}` their addresses, joined by commas; `{hostfile}` a file with a name on each line; `{rsh}` a program like "
        "rsh that runs a command on a host; `{folder}` the item's folder with its `files`; `{traffic_class}` what puts RoCE in "
        "qos.lossless_priority.",
        example="ping -c 3 {address:1}",
    )
    mode: Annotated[CommandMode, kinds.choice(CommandMode)] = _key(
        "mode",
        "foreground: the next command begins when it has ended. background: the next begins as soon as it is ready, and it "
        "ends by itself. service: likewise, but it is ended when all others have ended.",
        default="foreground",
    )
    ready_port: Annotated[int | None, kinds.integer(1, 65_535)] = _key(
        "ready_port", "It is ready when something on its host listens at this TCP port.", default=None
    )
    ready_output: Annotated[str | None, kinds.regex(0)] = _key(
        "ready_output", "It is ready when what it has written to standard output matches this.", default=None
    )
    environment: Annotated[Mapping[str, str], _VARIABLES] = _key(
        "environment", "Variables for it alone.", default={}, example={"OMP_NUM_THREADS": "1"}
    )


class Figure(_Section):
    """A number that a program writes."""

    name: Annotated[str, _FIGURE_NAME] = _key("name", "By which `expect` calls it: `figure.NAME`.", example="bandwidth")
    pattern: Annotated[str, kinds.regex(1)] = _key(
        "pattern",
        "A regular expression whose only group is the number; the last that matches in the commands' standard output counts. "
        "`^` and `$` are those of a line.",
        example="Bandwidth: ([0-9.]+)",
    )
    kind: Annotated[FigureKind, kinds.choice(FigureKind)] = _key(
        "kind",
        "What it is to time dilation: programs see this machine's clock, so a rate is multiplied and a time divided by the "
        "dilation to be that of the emulated fabric; a number stays.",
        default="number",
    )
    unit: Annotated[str, kinds.text(20)] = _key("unit", "Its unit, for people.", default="")


_ONE_COMMAND = {"host": 0, "command": "true"}


class ApplicationWorkload(_Section):
    """Programs on hosts of the fabric, unmodified."""

    application: Annotated[str, _NAME] = _key(
        "application", "Name of what runs; results are called so.", example="ib_write_bw"
    )
    commands: tuple[Command, ...] = _list_key(
        "commands",
        "The programs of an iteration, in the order in which they begin.",
        required=True,
        example=[_ONE_COMMAND],
    )
    figures: tuple[Figure, ...] = _list_key(
        "figures",
        "Numbers to take from what the programs write.",
        example=[{"name": "bandwidth", "pattern": "Bandwidth: ([0-9.]+)"}],
    )
    files: Annotated[Mapping[str, str], _FILES] = _key(
        "files",
        "Files to write into `{folder}` first: their names and contents.",
        default={},
        example={"hello": "text"},
    )
    setup: tuple[Annotated[str, _COMMAND], ...] = _list_key(
        "setup",
        "Command lines to run first, once, in `{folder}` and outside the fabric, such as a compiler's.",
        example=["cc -o {folder}/program {folder}/program.c"],
    )
    environment: Annotated[Mapping[str, str], _VARIABLES] = _key(
        "environment",
        "Variables for all commands, and for what `{rsh}` runs: with the placeholders of the host that it runs on.",
        default={},
        example={"UCX_NET_DEVICES": "{device}:1"},
    )
    iters: Annotated[int, kinds.integer(1, 10_000)] = _key("iters", "Measured iterations.", default=1)
    warmup_iters: Annotated[int, kinds.integer(0, 10_000)] = _key(
        "warmup_iters", "Iterations before, which are not measured.", default=0
    )
    wall_timeout_ns: Annotated[int, _WALL_TIMEOUT] = _key(
        "wall_timeout",
        "What the setup, and each iteration, may take on this machine's clock; then all is ended and the run fails.",
        default="120 s",
    )
