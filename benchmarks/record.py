"""Tables of figures: printed, kept in ``docs/performance-results.json``, and shown in ``docs/performance.md``.

The page is text with a place per table between ``<!-- NAME -->`` and ``<!-- /NAME -->``; only those places are written, always
from the JSON file. ``python -m benchmarks.record`` writes them again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.host import read_host_facts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "performance-results.json"
PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, Any]
_MISSING = "–"
_HOST_KEYS = (
    "kernel",
    "machine",
    "cpu_model",
    "cpus",
    "cpus_available",
    "memory_bytes",
    "load_average",
    "python",
    "numpy",
)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: Key of the rows.
        title: What it is.
        unit: Its unit, or nothing.
        form: Format specification; None for text.
        scale: What values are multiplied by.
    """

    key: str
    title: str
    unit: str = ""
    form: str | None = None
    scale: float = 1.0

    def cell(self, row: Row) -> str:
        """Return a row's value as text."""
        value = row.get(self.key)
        if value is None:
            return _MISSING
        return str(value) if self.form is None else format(value * self.scale, self.form)


@dataclass(frozen=True)
class Table:
    """One benchmark's figures.

    Attributes:
        name: Key in the results and place in the page.
        columns: What is shown of each row.
    """

    name: str
    columns: Sequence[Column]

    def _cells(self, rows: Sequence[Row]) -> list[list[str]]:
        cells = [[column.cell(row) for column in self.columns] for row in rows]
        for line, row in zip(cells, rows, strict=True):
            if row.get("disturbed"):
                line[0] += " *"
        return cells

    def text(self, rows: Sequence[Row]) -> str:
        """Return the table for a terminal: titles, units, rows."""
        lines = [[c.title for c in self.columns], [f"({c.unit})" if c.unit else "" for c in self.columns]]
        lines += self._cells(rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        left = [column.form is None for column in self.columns]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if flush else cell.rjust(width)
                for cell, width, flush in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )

    def markdown(self, section: dict[str, Any]) -> str:
        """Return the table with the facts of the machine, for the page."""
        host, rows = section["host"], section["rows"]
        heads = [f"{c.title} ({c.unit})" if c.unit else c.title for c in self.columns]
        lines = [
            f"| {' | '.join(heads)} |",
            "|" + "|".join(" --- " if c.form is None else " ---: " for c in self.columns) + "|",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in self._cells(rows)]
        worst = [max((row.get(key, 0.0) for row in rows), default=0.0) for key in ("steal_fraction", "others_fraction")]
        lines.append("")
        lines.append(
            f"{section['recorded']}, revision {section['revision']}: {host['cpu_model']}, {host['cpus_available']} CPUs, "
            f"Linux {host['kernel']}, Python {host['python']}, numpy {host['numpy']}. At most {worst[0]:.1%} of the CPU time "
            f"was stolen by the hypervisor, and {worst[1]:.1%} used by other processes, during any row. `{section['command']}`"
        )
        return "\n".join(lines)


def read_revision() -> str:
    """Return the commit that is checked out, with ``+`` when files differ from it; ``unknown`` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        # What the benchmarks themselves write is no other code.
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            f":!{RESULTS.relative_to(ROOT)}",
            f":!{PAGE.relative_to(ROOT)}",
        )
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def keep(table: Table, rows: Sequence[Row]) -> None:
    """Put a benchmark's rows, with the facts of this machine, into the results and the page."""
    host = read_host_facts()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[table.name] = {
        "recorded": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "revision": read_revision(),
        "command": f"python -m benchmarks.{table.name} --write",
        "host": {key: host[key] for key in _HOST_KEYS},
        "rows": list(rows),
    }
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True, allow_nan=False) + "\n")
    PAGE.write_text(fill_page(PAGE.read_text(), [table], known))


def fill_page(page: str, tables: Sequence[Table], results: dict[str, Any]) -> str:
    """Return the page with the figures of these tables.

    Raises:
        ValueError: The page has no place for one.
    """
    for table in tables:
        shown = table.markdown(results[table.name]) if table.name in results else "Not measured yet."
        begin, end = f"<!-- {table.name} -->\n", f"<!-- /{table.name} -->"
        head, found, rest = page.partition(begin)
        _, ended, tail = rest.partition(end)
        if not found or not ended or begin in tail:
            raise ValueError(f"the page must have one place for {table.name!r}")
        page = f"{head}{begin}\n{shown}\n\n{end}{tail}"
    return page


def run_benchmark(
    table: Table, measure: Callable[[bool], list[Row]], description: str, arguments: Sequence[str] | None = None
) -> list[Row]:
    """Run a benchmark from the command line: measure, print, and keep if asked.

    Args:
        table: What it shows.
        measure: Returns the rows, given whether to be quick.
        description: What it is.
        arguments: Of the command line; None for this process's.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it works, the figures mean nothing")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"keep the figures in {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}",
    )
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("figures of --quick mean nothing: they are not written")
    rows = measure(options.quick)
    print(table.text(rows))
    if any(row.get("disturbed") for row in rows):
        print("* the hypervisor or other processes took part of the machine meanwhile")
    if options.write:
        keep(table, rows)
    return rows


if __name__ == "__main__":
    from benchmarks.all import TABLES

    PAGE.write_text(fill_page(PAGE.read_text(), TABLES, json.loads(RESULTS.read_text())))
