"""Imports go one way: the table in docs/architecture.md is what the code does, and pure modules stay pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "testbed"
ARCHITECTURE = ROOT / "docs" / "architecture.md"

PURE = ("scenario", "topology", "routing", "collectives", "plan", "results", "roce", "assemble")
PURE_MODULES = ("measure.verdict", "measure.samples", "measure.counters")
# scapy is a driver of roce: it reads the machine's interfaces and routes when it is imported.
IMPURE_MODULES = ("roce.bth",)
FORBIDDEN_IN_PURE = ("pyroute2", "scapy", "socket", "subprocess", "ctypes", "typer", "time", "testbed.roce.bth")

EVERYTHING = "everything above"


def module_names() -> list[str]:
    """Every module of the package by its name below ``testbed``; a package's own is ``scenario.__init__``."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    return [".".join(path.parts) for path in paths]


MODULES = module_names()


def read_imports(module: str) -> set[str]:
    return find_imports((PACKAGE / (module.replace(".", "/") + ".py")).read_text(), module)


def find_imports(source: str, module: str) -> set[str]:
    """Return the full names of what a module imports anywhere, functions and ``if TYPE_CHECKING`` included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["testbed", *module.split(".")][: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner.removeprefix("testbed.") in {*MODULES, *(name.split(".")[0] for name in MODULES)}
                found.add(inner if base.partition(".")[0] == "testbed" and is_module else base)
    return found


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def find_impurities(imports: set[str]) -> list[str]:
    return sorted(name for name in imports if any(covers(one, name) for one in FORBIDDEN_IN_PURE))


def read_table(text: str) -> dict[str, list[str]]:
    """Return what each package may import, by package, in the order of the table's rows."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(r"\|\s*Package\s*\|", line))
    table: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        names, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        entries = [] if allowed == "nothing of ours" else [entry.strip() for entry in allowed.split(",")]
        for name in re.findall(r"`([^`]+)`", names):
            table[name] = [one for entry in entries for one in (table if entry == EVERYTHING else [entry])]
    return table


def find_violations(table: dict[str, list[str]], package: str, imports: set[str]) -> list[str]:
    ours = {name.removeprefix("testbed.") for name in imports if name.startswith("testbed.")}
    allowed = [package, *table[package]]
    return sorted(name for name in ours if not any(covers(entry, name) for entry in allowed))


TABLE = read_table(ARCHITECTURE.read_text())


PACKAGES = sorted({module.split(".")[0] for module in MODULES} - {"__init__"})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    assert package in TABLE, f"docs/architecture.md says nothing of {package}"
    violations = {
        module: wrong
        for module in MODULES
        if module.split(".")[0] == package
        for wrong in [find_violations(TABLE, package, read_imports(module))]
        if wrong
    }
    assert not violations, f"not in the table of docs/architecture.md: {violations}"


def test_the_table_has_no_row_too_many_and_no_arrow_backwards() -> None:
    assert sorted(TABLE) == PACKAGES
    above: list[str] = []
    for package, allowed in TABLE.items():
        backwards = [entry for entry in allowed if entry.split(".")[0] not in above]
        assert not backwards, f"{package} imports {backwards}, which stands below it"
        above.append(package)


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if (module.split(".")[0] in PURE or module in PURE_MODULES) and module not in IMPURE_MODULES
    ],
)
def test_a_pure_module_touches_neither_kernel_nor_clock(module: str) -> None:
    assert not find_impurities(read_imports(module))


def test_only_kernel_modules_reach_for_the_kernel() -> None:
    reaches = {
        module: wrong
        for module in MODULES
        if module.split(".")[0] != "kernel"
        for wrong in [{name for name in read_imports(module) if covers("ctypes", name) or covers("pyroute2", name)}]
        if wrong
    }
    assert not reaches


def test_planning_loads_neither_scapy_nor_the_engine() -> None:
    script = (
        "import sys, testbed; testbed.build_plan(testbed.load('scenarios/star.yaml'), measure=False); "
        "print(*[name for name in sys.modules if name in ('scapy', 'pyroute2', 'testbed.engine', 'testbed.kernel')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize("call", ["destroy('nosuch')", "execute('nosuch', 'host0', ['true'])"])
def test_what_only_touches_a_lab_loads_nothing_that_plans_one(call: str) -> None:
    script = (
        f"import contextlib, sys, testbed\nwith contextlib.suppress(Exception): testbed.{call}\n"
        "print(*[name for name in sys.modules if name in ('testbed.kernel.registry', 'testbed.scenario', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["testbed.kernel.registry"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", ["time"]),
        ("import os, subprocess as run", ["subprocess"]),
        ("from ctypes.util import find_library", ["ctypes.util"]),
        ("def f():\n    from scapy.layers.l2 import Ether", ["scapy.layers.l2"]),
        ("from testbed.roce import bth", ["testbed.roce.bth"]),
        ("from testbed.roce.bth import build_ack", ["testbed.roce.bth"]),
        ("import timeit, sockets", []),
        ("from testbed.roce import wire", []),
    ],
)
def test_impurities_are_found_in_every_form(source: str, expected: list[str]) -> None:
    assert find_impurities(find_imports(source, "plan.model")) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from testbed.kernel.packet_socket import FrameRing", []),
        ("from testbed.kernel import packet_socket", []),
        ("from testbed.engine.nic import NicPacer", []),
        ("from .nic import NicPacer", []),
        ("from ..kernel import bpf", ["kernel.bpf"]),
        ("from testbed.kernel import bpf", ["kernel.bpf"]),
        ("from testbed import fabric", ["fabric"]),
        ("import testbed.fabric.apply", ["fabric.apply"]),
        ("from testbed.rocelike import x", ["rocelike"]),
    ],
)
def test_violations_are_found_in_every_form(source: str, expected: list[str]) -> None:
    table = {"engine": ["roce", "kernel.packet_socket"]}
    assert find_violations(table, "engine", find_imports(source, "engine.loop")) == expected


def test_the_table_is_read_as_it_is_written() -> None:
    text = (
        "| Package | Owns | May import |\n| --- | --- | --- |\n"
        "| `units`, `errors` | text | nothing of ours |\n| `plan` | values | units |\n| `api` | calls | everything above |\n"
        "\n| x |"
    )
    assert read_table(text) == {"units": [], "errors": [], "plan": ["units"], "api": ["units", "errors", "plan"]}
