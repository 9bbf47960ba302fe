"""All benchmarks, one after the other: ``python -m benchmarks.all --write`` records the figures of ``docs/performance.md``.

About five minutes on an idle machine. Leave the machine alone meanwhile: rows that something disturbed are marked.
"""

from __future__ import annotations

import sys
import time

from benchmarks import bring_up, capacity, hosts, tick
from benchmarks.record import Table, run_benchmark

_BENCHMARKS = (capacity, tick, hosts, bring_up)
TABLES: tuple[Table, ...] = (capacity.TABLE, tick.TABLE, hosts.TABLE, bring_up.TABLE)


def main() -> None:
    """Run all."""
    for benchmark in _BENCHMARKS:
        begin = time.monotonic()
        print(f"# {benchmark.TABLE.name}", flush=True)
        run_benchmark(benchmark.TABLE, benchmark.measure, __doc__ or "", sys.argv[1:])
        print(f"# {benchmark.TABLE.name}: {time.monotonic() - begin:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
