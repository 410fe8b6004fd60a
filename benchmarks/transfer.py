"""How well pre-training transfers to a detector: ``python -m benchmarks.transfer``. See docs/transfer.md.

A cell is a method and a seed: pre-train ResNet-18 by the method, fine-tune the small Mask R-CNN from it on the cut-out
set of ``make data``, evaluate with pycocotools. Each cell's result is written when it is done; then there is a table,
with paired differences, and a plot of all cells that exist. The same command continues what was cut and does what is
missing.
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from benchmarks import charts
from benchmarks.common import ROOT, Result, environment, progress
from benchmarks.transfer_baselines import KINDS as BASELINES
from benchmarks.transfer_baselines import WEIGHTS, flops
from benchmarks.transfer_protocol import Protocol, ProtocolError, Work
from benchmarks.transfer_report import evaluate, table
from mcl.records import metrics
from mcl.signals import Signals
from mcl.train import checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "transfer"

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Of the commands: a core for each."""

LOGS = "commands"
"""Folder, in the work folder, of what is known of commands."""

_POLL = 0.5  # seconds
_LOG_LINES = 12  # of a failed command, that are shown


@dataclass(frozen=True)
class Method:
    pretraining: str | None  # None: from scratch
    parts: tuple[str, ...] = ("backbone",)  # that fine-tuning starts from
    once: bool = False  # with the first seed alone


METHODS = {
    "random": Method(None, ()),
    "mcl-all": Method("mcl", ("backbone", "fpn", "head")),
    "mcl-backbone": Method("mcl"),
    "moco": Method("moco"),
    "supervised": Method("supervised"),
    "mcl-fpn": Method("mcl", ("backbone", "fpn")),
    "mcl-released": Method("mcl-released", ("backbone", "fpn", "head"), once=True),
}
"""In the order in which they run, within a seed."""

PAIRS = (
    *((name, "random") for name in METHODS if name != "random"),
    ("mcl-all", "moco"),
    ("mcl-backbone", "moco"),
    ("mcl-fpn", "mcl-backbone"),  # what the FPN adds, then the head, then both
    ("mcl-all", "mcl-fpn"),
    ("mcl-all", "mcl-backbone"),
)
"""Methods whose difference is reported."""


@dataclass(frozen=True)
class Cell:
    """A method with a seed, which is that of pre-training and fine-tuning."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def kind(self) -> str | None:
        """Of its pre-training."""
        return METHODS[self.method].pretraining

    @property
    def pretraining(self) -> str:
        """Name of its pre-training, if it has one; several cells may have it in common."""
        return f"{self.kind}-{self.seed}"


def cells(methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """In the order in which they run: seed after seed."""
    return [
        Cell(name, seed)
        for seed in seeds
        for name, method in METHODS.items()
        if name in methods and (seed == seeds[0] or not method.once)
    ]


@dataclass(frozen=True)
class Command:
    """Arguments of Python that start or continue a run; paths in them are relative to the checkout."""

    name: str
    arguments: tuple[str, ...]

    @property
    def shell(self) -> str:
        """As a shell takes it, in the checkout."""
        return " ".join([*(f"{k}={v}" for k, v in ENVIRONMENT.items()), shlex.join(["python", *self.arguments])])


def pretrain(cell: Cell, work: Work) -> Command:
    """The pre-training of a cell that has one."""
    if cell.kind in BASELINES:
        arguments = ["-m", "benchmarks.transfer_baselines", cell.kind, f"--seed={cell.seed}", f"--work={work.folder}"]
    else:
        arguments = [
            *("-m", "mcl", "pretrain", work.protocol.preset, *work.words(cell.seed)),
            *(f"name={cell.pretraining}", f"output={work.folder / 'pretrain'}"),
            *("model.compute=released",) * (cell.kind == "mcl-released"),
            *("trainer.device=cpu", "trainer.threads=1", "data.threads=1", "trainer.checkpoint_epochs=1"),
            *("evaluation.at_end=[]", "log.tensorboard=false", "log.preview=false"),
        ]
    return Command(f"pretrain-{cell.pretraining}", tuple(arguments))


def finetune(cell: Cell, work: Work) -> Command:
    """The fine-tuning of a cell, from what its pre-training leaves, and its evaluation."""
    start = []
    if cell.kind:
        file = WEIGHTS if cell.kind in BASELINES else f"checkpoints/{checkpoint.LAST}"
        parts = ",".join(METHODS[cell.method].parts)
        start = [f"weights={work.folder / 'pretrain' / cell.pretraining / file}", f"parts=[{parts}]"]
    arguments = (
        *("-m", "mcl", "finetune", work.protocol.detector, *work.protocol.finetuning, *start),
        *(f"data.root={work.protocol.detection}", f"randomness.seed={cell.seed}"),
        *(f"name={cell.name}", f"output={work.folder / 'finetune'}"),
    )
    return Command(f"finetune-{cell.name}", arguments)


def execute(command: Command, folder: Path, running: set[int]) -> None:
    """Starts or continues a command that is not done yet, and waits for it.

    It writes ``<name>.log`` and ``<name>.jsonl``: a line for each start, with the ``exit`` code, the seconds by the
    clock, ``wall_s``, and those of all its processes, ``cpu_s``.

    Args:
        folder: of log and record.
        running: process ids of all running commands.

    Raises:
        RuntimeError: it failed.
    """
    if any(start["exit"] == 0 for start in starts(command, folder)):
        return
    path, begun = folder / f"{command.name}.log", time.monotonic()
    print(f"{command.name}: started; see {path}", flush=True)
    with open(path, "ab") as log:
        log.write(f"$ {command.shell}\n".encode())
        log.flush()
        arguments, env = [sys.executable, *command.arguments], {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    running.add(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    running.remove(process.pid)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    # The processor's time is the command's own and that of the processes that it waited for.
    record = {"exit": code, "wall_s": time.monotonic() - begun, "cpu_s": usage.ru_utime + usage.ru_stime}
    with open(path.with_suffix(".jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
    if code:
        tail = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        raise RuntimeError("\n    ".join([f"{command.name}: exit code {code}; the end of {path}:", *tail]))


def starts(command: Command, folder: Path) -> list[metrics.Record]:
    """The record of a command."""
    return metrics.read(folder / f"{command.name}.jsonl")


def collect(cell: Cell, work: Work, jobs: int) -> Result:
    """The result of a cell whose commands are done."""
    folder = ROOT / work.folder
    record = json.loads((folder / "finetune" / cell.name / "ap.json").read_text())[-1]
    commands = {"pretraining": pretrain(cell, work) if cell.kind else None, "finetuning": finetune(cell, work)}
    return {
        "method": cell.method,
        "seed": cell.seed,
        "protocol": work.protocol.plain(),
        "configurations": work.protocol.configurations,
        **{of: {name: record[of][name] for name in ("AP", "AP50", "AP75")} for of in ("box", "mask")},
        "hours": {stage: command and _hours(starts(command, folder / LOGS)) for stage, command in commands.items()},
        "jobs": jobs,
        "supervised_epochs": supervised_epochs(cell.kind, work),
        "commands": [command.shell for command in commands.values() if command],
        "environment": {**environment("mmdet", "mmcv", "mmengine", "pycocotools"), "threads": 1},  # of the commands
    }


@functools.cache
def supervised_epochs(kind: str | None, work: Work) -> float:
    """Epochs of supervised training, at the same size of images, that have as many FLOPs as a pre-training."""
    return work.protocol.epochs * flops(kind, work) / flops("supervised", work) if kind else 0.0


def _hours(each: Sequence[metrics.Record]) -> dict[str, float]:
    """Of all starts of a command: by the clock, and of all its processes."""
    wall, cpu = (sum(start[key] for start in each) / 3600 for key in ("wall_s", "cpu_s"))
    return {"wall": wall, "cpu": cpu, "starts": len(each)}


def read(folder: Path, protocol: Protocol) -> dict[Cell, Result]:
    """The results in a folder.

    Raises:
        ProtocolError: one is of another protocol, or of other configuration files.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        protocol.check(result, path)
        results[Cell(result["method"], result["seed"])] = result
    return results


def run(wanted: Sequence[Cell], protocol: Protocol, folder: Path, results: Path, jobs: int) -> int:
    """Does the cells that have no result yet, until all are done or failed, or SIGINT or SIGTERM comes.

    The signal is passed on, and what runs then saves and ends.

    Args:
        wanted: in the order in which they run.
        folder: of the work.
        results: of the cells' files.
        jobs: commands at once.

    Returns:
        The exit status: 0 unless a cell failed or a signal came.

    Raises:
        ProtocolError: folder or results are of another protocol.
    """
    there = read(results, protocol)
    missing = [cell for cell in wanted if cell not in there]
    if not missing:
        return 0
    work, failed = Work(folder, protocol), 0
    logs, running = ROOT / work.folder / LOGS, set[int]()
    for made in (logs, results):
        made.mkdir(parents=True, exist_ok=True)

    def do(cell: Cell, pretraining: Future[None] | None) -> None:
        if pretraining is not None:
            pretraining.result()
        execute(finetune(cell, work), logs, running)
        metrics.rewrite(results / f"{cell.name}.json", json.dumps(collect(cell, work, jobs), indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool, Signals() as signals:
        pretrainings: dict[str, Future[None]] = {}
        pending: dict[Future[None], Cell] = {}
        for cell in missing:
            if cell.kind and cell.pretraining not in pretrainings:
                pretrainings[cell.pretraining] = pool.submit(execute, pretrain(cell, work), logs, running)
            pending[pool.submit(do, cell, pretrainings.get(cell.pretraining))] = cell
        for _ in progress(missing, lambda _: "cells"):
            while not (done := wait(pending, _POLL, FIRST_COMPLETED).done) and not signals.received:
                pass
            if not done:
                break
            future = done.pop()
            cell, error = pending.pop(future), future.exception()
            failed += error is not None
            print(f"{cell.name}: {f'failed: {error}' if error else 'done'}", flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in (*pretrainings.values(), *pending)):
            for process in running.copy():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            time.sleep(_POLL)
    if pending:
        print(f"not done: {', '.join(cell.name for cell in pending.values())}; the same command continues")
    return 128 + signals.received if signals.received else int(failed > 0)


def publish(results: Path, protocol: Protocol) -> None:
    """Prints the table of the cells that exist, and writes ``<results>.json`` and ``<results>.png``.

    The environment is that of the newest cell; cells that had another machine or other versions are named.

    Raises:
        ProtocolError: a cell is of another protocol.
    """
    there = read(results, protocol)
    evaluated = evaluate(list(there.values()), list(METHODS), PAIRS)
    print(f"\n{table(evaluated)}")
    if not there:
        return
    environments = {cell.name: result["environment"] for cell, result in there.items()}
    newest = max(environments.values(), key=lambda each: str(each["date"]))
    same = [key for key in newest if key not in ("commit", "date")]
    others = sorted(name for name, each in environments.items() if any(each[key] != newest[key] for key in same))
    if others:
        print(f"\nOn another machine or by other versions: {', '.join(others)}.")
    config = {"protocol": next(iter(there.values()))["protocol"], "cells": sorted(environments), "others": others}
    report = {"environment": newest, "config": config, "results": evaluated}
    metrics.rewrite(results.with_name(f"{results.name}.json"), json.dumps(report, indent=1) + "\n")
    rows = {r["name"]: r for r in evaluated if r["kind"] == "method"}
    charts.points(
        "Box AP50 on the cut-out set: a point per seed, a line at the mean",
        {name: dict(zip(r["seeds"], r["box AP50"]["values"], strict=True)) for name, r in rows.items()},
        results.with_name(f"{results.name}.png"),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="who takes part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of pre-training and fine-tuning")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="commands at once, a core for each")
    parser.add_argument("--report", action="store_true", help="only report the cells that exist")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "transfer", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells' files")
    options = parser.parse_args(arguments)
    wanted, protocol = cells(options.methods, options.seeds), Protocol()
    try:
        status = 0 if options.report else run(wanted, protocol, options.work, options.results, options.jobs)
        publish(options.results, protocol)
    except ProtocolError as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
