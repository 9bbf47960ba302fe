"""Plain text for terminals: columns that line up, JSON, errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from testbed.errors import TestbedError


def render_columns(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> str:
    """Return rows under a header, columns aligned, each line ended by a newline.

    Args:
        header: Names of the columns.
        rows: Cells, as many per row as there are columns.
        right: Names of the columns that are aligned to the right.
    """
    table = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def render_json(value: Any) -> str:
    """Return dataclasses and plain data as JSON text, two spaces of indent, without a final newline."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def print_error(error: TestbedError) -> None:
    """Print message and hint on stderr, without a traceback."""
    lines = error.message.splitlines() or [""]
    for line in lines:
        # A scenario's mistakes are a line each, with hints of their own between them.
        if line.startswith("  hint: "):
            print(f"hint:  {line.removeprefix('  hint: ')}", file=sys.stderr)
        else:
            print(f"error: {line}", file=sys.stderr)
    if error.hint:
        print(f"hint:  {error.hint}", file=sys.stderr)
