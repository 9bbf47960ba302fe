"""The table that a run prints, in the manner of nccl-tests."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from testbed.results.model import ApplicationResult, CollectiveResult

UNMEASURED = "-"


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    unit: str
    left: bool = False


_COLUMNS = (
    _Column("size", "(B)"),
    _Column("count", "(elements)"),
    _Column("type", "", left=True),
    _Column("nranks", "(count)"),
    _Column("collective", "", left=True),
    _Column("algorithm", "", left=True),
    _Column("iters", "(count)"),
    _Column("time", "(us)"),
    _Column("min", "(us)"),
    _Column("max", "(us)"),
    _Column("algbw", "(GB/s)"),
    _Column("busbw", "(GB/s)"),
    _Column("ideal", "(us)"),
    _Column("ratio", "(time/ideal)"),
    _Column("#drops", "(packets)"),
    _Column("verdict", "", left=True),
)


# Where jobs run at once.
_JOB_COLUMNS = (
    _Column("job", "", left=True),
    _Column("beside", "", left=True),
    _Column("slowdown", "(time/alone)"),
)


_APPLICATION_COLUMNS = (
    _Column("application", "", left=True),
    _Column("figure", "", left=True),
    _Column("value", ""),
    _Column("unit", "", left=True),
    _Column("printed", ""),
    _Column("iters", "(count)"),
    _Column("wall time", "(s)"),
    _Column("#drops", "(packets)"),
    _Column("#marked", "(packets)"),
    _Column("#pauses", "(frames)"),
    _Column("verdict", "", left=True),
)


def render_table(rows: Sequence[CollectiveResult], comments: Sequence[str] = ()) -> str:
    """Return the results as text for people and for scripts that skip lines beginning with ``#``.

    Args:
        rows: One per collective and size.
        comments: Lines to put above the table, without their ``#``.

    Returns:
        Comment lines, a header row, a units row and one row per result, each ended by a newline. All figures
        are emulated; ``time`` is the median over the iterations, 1 GB is 10^9 bytes; ``-`` stands for what
        was not measured. ``verdict`` says whether this machine could be trusted with that row. Rows of jobs begin with the job,
        those that ran beside it and what they cost it.

    Source:
        nccl-tests, src/util.cu (the columns and their units).
    """
    columns = _COLUMNS if all(row.job is None for row in rows) else (*_JOB_COLUMNS, *_COLUMNS)
    return _render(
        columns, [_cells(row) if columns is _COLUMNS else [*_job_cells(row), *_cells(row)] for row in rows], comments
    )


def render_applications(rows: Sequence[ApplicationResult], comments: Sequence[str] = ()) -> str:
    """Return the results of applications as text, as `render_table` does: a row for each figure, or for one that has none.

    Figures are emulated, but for ``printed``, which is what the application wrote, and ``wall time``; all three are medians
    over the iterations.
    """
    cells = []
    for row in rows:
        figures = [
            [figure.name, _number(figure.value), figure.unit, _number(_median_of(figure.printed))]
            for figure in row.figures
        ]
        cells += [_application_cells(row, figure) for figure in figures or [[UNMEASURED] * 4]]
    return _render(_APPLICATION_COLUMNS, cells, comments)


def _median_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _number(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.6g}"


def _application_cells(row: ApplicationResult, figure: Sequence[str]) -> list[str]:
    counts = row.fabric
    return [
        row.application,
        *figure,
        str(len(row.wall_duration_ns)),
        _scaled(statistics.median(row.wall_duration_ns) if row.wall_duration_ns else None, 1e9, 3),
        _scaled(counts.drops_packets, 1, 0),
        _scaled(counts.ecn_marked_packets, 1, 0),
        _scaled(counts.pause_frames, 1, 0),
        UNMEASURED if row.fidelity is None else str(row.fidelity.verdict),
    ]


def _render(columns: Sequence[_Column], rows: Sequence[Sequence[str]], comments: Sequence[str]) -> str:
    """Return comments, a header row, a units row and rows of cells."""
    cells = [[column.name for column in columns], [column.unit for column in columns], *rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [f"# {comment}".rstrip() for comment in comments]
    for number, line in enumerate(cells):
        padded = [
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append((("# " if number < 2 else "  ") + "  ".join(padded)).rstrip())
    return "\n".join(lines) + "\n"


def _job_cells(row: CollectiveResult) -> list[str]:
    return [row.job or UNMEASURED, ",".join(row.beside) or UNMEASURED, _scaled(row.slowdown, 1, 4)]


def _cells(row: CollectiveResult) -> list[str]:
    times = row.cct_ns
    return [
        str(row.size_bytes),
        UNMEASURED if row.count is None else str(row.count),
        row.datatype,
        str(row.nranks),
        row.collective,
        row.algorithm,
        str(len(times)),
        _scaled(statistics.median(times) if times else None, 1e3, 2),
        _scaled(min(times, default=None), 1e3, 2),
        _scaled(max(times, default=None), 1e3, 2),
        _scaled(row.algbw_bytes_per_s, 1e9, 2),
        _scaled(row.busbw_bytes_per_s, 1e9, 2),
        _scaled(row.cct_ideal_ns, 1e3, 2),
        _scaled(row.cct_ratio, 1, 4),
        _scaled(row.fabric.drops_packets, 1, 0),
        UNMEASURED if row.fidelity is None else str(row.fidelity.verdict),
    ]


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return UNMEASURED if value is None else f"{value / unit:.{digits}f}"
