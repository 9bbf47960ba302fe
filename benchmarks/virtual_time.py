"""Does a run in virtual time repeat beside busy neighbours, and does the same run directly on this machine?

Needs root, and ``scripts/setup-vm``.

::

    .venv/bin/python -m benchmarks.virtual_time                 # five runs each way, three of them beside four busy loops
    .venv/bin/python -m benchmarks.virtual_time --how direct    # one way alone
    .venv/bin/python -m benchmarks.virtual_time --real-time     # beside two that have real-time priority, above the engine's

`scenarios/virtual-time.yaml` (2x2x2, 4 MiB), one iteration a run. Exit code 1 if the runs in virtual time spread by more than
half a percent or one is not trusted. The direct runs are there to compare with: what disturbs them makes them spread more, or say
that they are not to be trusted. Ordinary busy loops need not: the engine goes before them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SCENARIO = Path(__file__).parents[1] / "scenarios" / "virtual-time.yaml"
WAYS = {"virtual time": ["--virtual-time"], "direct": []}
SPREAD_BAR_FRACTION = 0.005
# A run that only asks to be trusted less, or whose expectations are not met, has a result all the same.
_RESULT_EXITS = (0, 3, 4)
_RUN_TIMEOUT_S = 550
_LOOP = "while True: pass"
# 60 ms in 100, above the engine (testbed.kernel.scheduling.ENGINE_FIFO_PRIORITY).
_PULSE = """\
import os, time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
while True:
    end = time.monotonic() + 0.06
    while time.monotonic() < end:
        pass
    time.sleep(0.04)
"""
_NEIGHBOURS, _REAL_TIME_NEIGHBOURS = 4, 2


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        way: How: a key of `WAYS`.
        neighbours: Busy loops beside it.
        cct_ns: Completion time, emulated.
        verdict: What the run says of itself.
        wall_s: What it took of the host's time.
    """

    way: str
    neighbours: int
    cct_ns: float
    verdict: str
    wall_s: float


@contextlib.contextmanager
def busy_neighbours(count: int, *, real_time: bool = False) -> Iterator[None]:
    """Keep processes that do nothing but compute for the block; with real-time priority for 60 ms in each 100."""
    hogs = [subprocess.Popen([sys.executable, "-c", _PULSE if real_time else _LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def spread_fraction(times_ns: Sequence[float]) -> float:
    """Return by how much the longest time is above the shortest."""
    return max(times_ns) / min(times_ns) - 1.0


def judge(runs: Sequence[Run]) -> tuple[bool, str]:
    """Return whether runs of one way repeat and trust themselves, and a sentence about them."""
    spread = spread_fraction([run.cct_ns for run in runs])
    distrusted = sum(run.verdict != "trusted" for run in runs)
    text = f"{runs[0].way}: {len(runs)} runs spread by {spread:.3%}, {distrusted} of them not trusted"
    return spread <= SPREAD_BAR_FRACTION and not distrusted, text


def run_once(way: str, neighbours: int, *, real_time: bool = False) -> Run:
    """Run the scenario.

    Raises:
        RuntimeError: It has no result.
    """
    with tempfile.TemporaryDirectory() as folder, busy_neighbours(neighbours, real_time=real_time):
        command = [sys.executable, "-m", "testbed", "run", str(SCENARIO), "--iters", "1", "--no-series"]
        command += [*WAYS[way], "--output", folder]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_RUN_TIMEOUT_S)
        wall_s = time.monotonic() - begin
        if done.returncode not in _RESULT_EXITS:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        result = json.loads((Path(folder) / "result.json").read_text())
    return Run(way, neighbours, result["results"][0]["cct_ns"][0], result["fidelity"]["verdict"], wall_s)


def main() -> None:
    """Run, print a line a run and what came of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--how", choices=["virtual", "direct", "both"], default="both")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--disturbed", type=int, default=3, help="how many of them have neighbours")
    parser.add_argument("--neighbours", type=int, help="busy loops beside those; 4, with --real-time 2")
    parser.add_argument("--real-time", action="store_true", help="they go before the engine for 60 ms in each 100")
    options = parser.parse_args()
    beside = options.neighbours or (_REAL_TIME_NEIGHBOURS if options.real_time else _NEIGHBOURS)
    repeats = True
    print("| way | busy loops beside | completion time (us) | verdict | took (s) |\n| --- | ---: | ---: | --- | ---: |")
    said = []
    for way in WAYS:
        if options.how not in ("both", way.split()[0]):
            continue
        runs = []
        for number in range(options.runs):
            neighbours = beside if number >= options.runs - options.disturbed else 0
            run = run_once(way, neighbours, real_time=options.real_time)
            runs.append(run)
            print(f"| {way} | {neighbours} | {run.cct_ns / 1e3:.3f} | {run.verdict} | {run.wall_s:.0f} |", flush=True)
        good, text = judge(runs)
        said.append(text)
        repeats = repeats and (good or way == "direct")
    print("\n" + "\n".join(said))
    sys.exit(0 if repeats else 1)


if __name__ == "__main__":
    main()
