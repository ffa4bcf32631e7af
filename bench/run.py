"""What Stillframe costs, beside the floor and beside the peers' way, in one run on real VMs.

    make bench                        (or: python -m bench.run --runs 20)
    make bench ARGS=--quick           three runs of each, to try it out
    make bench ARGS='--only cold-fork,idle-pause'

Writes results.json, results.md and plots/*.png, and prints the tables. A full run writes into
bench/; a partial or quick one into build/bench/, so that it never replaces the real figures.
Exit code 0 if everything could be measured or says why not, whether or not the targets are
reached; 1 if a measurement failed; 130 when interrupted. Nothing is left behind in any case.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bench import (
    rows_forks,
    rows_hypervisors,
    rows_keeping,
    rows_many,
    rows_pause,
    rows_restore,
    rows_storage,
)
from bench.lab import Lab, open_lab
from bench.plots import draw
from bench.report import ROOT, Circumstances, changed_files, file_system_of, write
from bench.results import Row
from bench.server import scratch_directory


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that one module measures together."""

    keys: tuple[str, ...]
    measure: Callable[[Lab, set[str]], list[Row]]


# In the order of the table.
KEYS = (
    *rows_forks.KEYS, *rows_pause.KEYS, *rows_storage.KEYS, *rows_many.KEYS, *rows_restore.KEYS,
    *rows_hypervisors.KEYS, *rows_keeping.KEYS,
)  # fmt: skip
# In the order of measuring: memory first, while nothing else has moved it yet.
BLOCKS = (
    Block(("fork-memory",), rows_storage.measure),
    Block(rows_forks.KEYS, rows_forks.measure),
    Block(rows_pause.KEYS, rows_pause.measure),
    Block(("second-snapshot",), rows_storage.measure),
    Block(rows_many.KEYS, rows_many.measure),
    Block(rows_restore.KEYS, rows_restore.measure),
    Block(rows_hypervisors.KEYS, rows_hypervisors.measure),
    Block(rows_keeping.KEYS, rows_keeping.measure),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; the exit code."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        with scratch_directory() as directory:
            with open_lab(directory, runs=options.runs, quick=options.quick) as lab:
                rows = measure(lab, set(options.only))
            facts = Circumstances(
                options.runs, options.quick, lab.has_resumed_at,
                lab.about.get("hypervisor_version", "unknown"),
                lab.about.get("accelerator", "unknown"), file_system_of(directory),
                time.monotonic() - began, load,
            )  # fmt: skip
            plots = draw(rows, options.out / "plots")
            print(write(rows, facts.as_json(), options.out, plots))
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return 130
    print(f"written to {options.out}", file=sys.stderr)
    return 1 if any(row.failed for row in rows) else 0


def measure(lab: Lab, wanted: set[str]) -> list[Row]:
    """Every wanted row, one block after another. A block that fails does not stop the others."""
    rows: list[Row] = []
    for block in BLOCKS:
        keys = wanted & set(block.keys)
        if not keys:
            continue
        names = ", ".join(key for key in block.keys if key in keys)
        print(f"measuring {names}", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            rows += block.measure(lab, keys)
            lab.say(f"{time.monotonic() - began:.0f} s")
        except Exception as error:  # it is reported, and the run fails in the end
            traceback.print_exc()
            rows += [Row(key, key, "-", failed=str(error)) for key in block.keys if key in keys]
        lab.clear()
    return sorted(rows, key=lambda row: KEYS.index(row.key))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """End in order; a second signal must not end the clean-up half way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; ends the program for bad ones, as argparse does."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, help="of each measurement (default 20, quick 3)")
    parser.add_argument("--only", default="", help="rows, by commas: " + ", ".join(KEYS))
    parser.add_argument("--quick", action="store_true", help="few runs, to try it out")
    parser.add_argument("--out", type=Path, help="where to write")
    options = parser.parse_args(arguments)
    only = [key for key in options.only.split(",") if key]
    if unknown := sorted(set(only) - set(KEYS)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(KEYS)}")
    partial = options.quick or only or options.runs is not None
    if not partial and options.out is None and (changed := changed_files()):
        parser.error(
            f"figures are of a commit, and {', '.join(changed)} changed since: commit, or use --out"
        )
    options.out = options.out or ROOT / ("build/bench" if partial else "bench")
    options.only = only or list(KEYS)
    options.runs = options.runs or (3 if options.quick else 20)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
