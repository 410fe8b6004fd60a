"""How well pre-training transfers to a detector: ``python -m benchmarks.transfer``. See docs/transfer.md.

A cell is a method and a seed: pre-train ResNet-18 by the method, fine-tune the small Mask R-CNN from it on the cut-out
set of ``make data``, evaluate with pycocotools. Each cell's result is written when it is done; then there is a table,
with paired differences, and a plot of all cells that exist. The same command continues what was cut and does what is
missing.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import Result
from benchmarks.transfers import cells, chart, report, tasks
from benchmarks.transfers.methods import ENVIRONMENT, METHODS, Cell
from benchmarks.transfers.methods import cells as chosen
from benchmarks.transfers.protocol import ROOT, Protocol, ProtocolError, Work, write

RESULTS = ROOT / "benchmarks" / "results" / "transfer"

table = report.table
"""For :mod:`benchmarks.readme`."""


def run(wanted: Sequence[Cell], protocol: Protocol, folder: Path, results: Path, jobs: int, hours: float) -> int:
    """Does the cells that have no result yet; returns the exit status.

    Args:
        wanted: in the order in which they run.
        folder: of the work.
        results: of the cells' files.
        jobs: commands at once.
        hours: after which everything is stopped.

    Raises:
        ProtocolError: folder or results are of another protocol, or the folder is in use.
    """
    there = cells.read(results, protocol)
    missing = [cell for cell in wanted if cell not in there]
    if not missing:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with tasks.locked(folder) as lock:
        work = Work(folder, protocol)
        outcome = tasks.run(
            cells.plan(missing, work, results, jobs),
            folder / "tasks",
            jobs,
            lock,
            seconds=3600 * hours,
            environment={**os.environ, **ENVIRONMENT},
            say=lambda line: print(line, flush=True),
        )
    if outcome.left:
        print(f"not done: {', '.join(outcome.left)}; the same command continues", flush=True)
    return 128 + outcome.signal if outcome.signal else 1 if outcome.failed else 0


def publish(results: Path, protocol: Protocol) -> None:
    """Prints the table of the cells that exist, and writes ``<results>.json`` and ``<results>.png``.

    Raises:
        ProtocolError: a cell is of another protocol.
    """
    there: Mapping[Cell, Result] = cells.read(results, protocol)
    evaluated = report.evaluate(there)
    print(f"\n{table(evaluated)}")
    if there:
        whole = report.report(there, evaluated)
        if whole["config"]["others"]:
            print(f"\nOn another machine or by other versions: {', '.join(whole['config']['others'])}.")
        write(results.with_name(f"{results.name}.json"), json.dumps(whole, indent=1) + "\n")
        chart.draw(evaluated, results.with_name(f"{results.name}.png"))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    protocol = Protocol.quick() if options.quick else Protocol()
    folder = options.work or ROOT / "runs" / ("transfer-quick" if options.quick else "transfer")
    results = options.results or (folder / "results" if options.quick else RESULTS)
    try:
        wanted = chosen(options.methods, options.seeds)
        status = 0 if options.report else run(wanted, protocol, folder, results, options.jobs, options.hours)
        publish(results, protocol)
    except ProtocolError as error:
        sys.exit(str(error))
    sys.exit(status)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="who takes part")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of pre-training and fine-tuning")
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--jobs", type=int, default=cores, help="commands at once, a core for each")
    options.add_argument("--hours", type=float, default=float("inf"), help="stop after so many")
    options.add_argument("--report", action="store_true", help="only report the cells that exist")
    options.add_argument("--quick", action="store_true", help="two steps of everything, to see that it works")
    options.add_argument("--work", type=Path, help="folder of runs, default runs/transfer; with --quick, ...-quick")
    options.add_argument("--results", type=Path, help="folder of the cells' files; with --quick, results in --work")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
