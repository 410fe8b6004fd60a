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
from operator import itemgetter
from pathlib import Path

from benchmarks import charts
from benchmarks.common import ROOT, Result, environment, progress_line, write
from benchmarks.transfer_baselines import KINDS as BASELINES
from benchmarks.transfer_baselines import LOSSES, WEIGHTS, flops
from benchmarks.transfer_protocol import Protocol, ProtocolError, Work
from benchmarks.transfer_report import evaluate, table
from mcl.distributed.signals import Signals
from mcl.records import metrics
from mcl.train import checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "transfer"

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Of the commands: a core for each."""

_POLL = 0.5  # seconds
_LOG_LINES = 12  # of a failed command, that are shown
_BACKBONE, _FPN, _HEAD = r"backbone\.", r"neck\.", r"roi_head\.bbox_head\.shared_convs\."


@dataclass(frozen=True)
class Method:
    pretraining: str | None  # None: from scratch
    parts: tuple[str, ...] = (_BACKBONE,)  # pretrained.names
    once: bool = False  # with the first seed alone


METHODS = {
    "random": Method(None, ()),
    "mcl-all": Method("mcl", (_BACKBONE, _FPN, _HEAD)),
    "mcl-backbone": Method("mcl"),
    "moco": Method("moco"),
    "supervised": Method("supervised"),
    "mcl-fpn": Method("mcl", (_BACKBONE, _FPN)),
    "mcl-released": Method("mcl-released", (_BACKBONE, _FPN, _HEAD), once=True),
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
            f"trainer.log_every={work.steps_per_epoch}",  # so that the last record is the mean of the last epoch
            *("evaluation.at_end=[]", "log.tensorboard=false", "log.preview=false"),
        ]
    return Command(f"pretrain-{cell.pretraining}", tuple(arguments))


def finetune(cell: Cell, work: Work) -> Command:
    """The fine-tuning of a cell, from what its pre-training leaves, and its evaluation."""
    start = []
    if cell.kind:
        file = WEIGHTS if cell.kind in BASELINES else f"checkpoints/{checkpoint.LAST}"
        names = ",".join(f"'{part}'" for part in METHODS[cell.method].parts)
        start = [f"weights={work.folder / 'pretrain' / cell.pretraining / file}", f"pretrained.names=[{names}]"]
    arguments = (
        *("-m", "mcl", "finetune", work.protocol.detector, *work.protocol.finetuning, *start),
        *(f"data.root={work.protocol.detection}", f"randomness.seed={cell.seed}"),
        *(f"name={cell.name}", f"output={work.folder / 'finetune'}"),
    )
    return Command(f"finetune-{cell.name}", arguments)


class Runner:
    """Runs commands to their end, each once.

    Of every command there are a log, ``<name>.log``, and a record, ``<name>.jsonl``: a line for each start, with the
    ``exit`` code, the seconds by the clock, ``wall_s``, and those of all its processes, ``cpu_s``.

    Args:
        folder: of logs and records.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._running, self._stopped = folder, set[int](), False
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, command: Command) -> None:
        """Starts or continues a command that is not done yet, and waits for it.

        Raises:
            RuntimeError: it failed, or :meth:`stop` was called.
        """
        if any(start["exit"] == 0 for start in self.starts(command)):
            return
        path, begun = self._folder / f"{command.name}.log", time.monotonic()
        with open(path, "ab") as log:
            log.write(f"$ {command.shell}\n".encode())
            log.flush()
            arguments, env = [sys.executable, *command.arguments], {**os.environ, **ENVIRONMENT}
            process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._running.add(process.pid)
        if self._stopped:
            process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        self._running.discard(process.pid)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        # The processor's time is the command's own and that of the processes that it waited for.
        record = {"exit": code, "wall_s": time.monotonic() - begun, "cpu_s": usage.ru_utime + usage.ru_stime}
        with open(path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(record) + "\n")
        if code:
            tail = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise RuntimeError("\n    ".join([f"{command.name}: exit code {code}; the end of {path}:", *tail]))

    def starts(self, command: Command) -> list[metrics.Record]:
        """The record of a command."""
        return metrics.read(self._folder / f"{command.name}.jsonl")

    def stop(self) -> None:
        """Ends what runs, and what is about to."""
        self._stopped = True
        for pid in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def collect(cell: Cell, work: Work, runner: Runner, jobs: int) -> Result:
    """The result of a cell whose commands are done."""
    folder = ROOT / work.folder
    run = folder / "finetune" / cell.name
    record = json.loads((run / "ap.json").read_text())[-1]
    commands = {"pretraining": pretrain(cell, work) if cell.kind else None, "finetuning": finetune(cell, work)}
    losses = {
        "pretraining": _pretraining_loss(folder / "pretrain" / cell.pretraining) if cell.kind else None,
        "finetuning": _finetuning_losses(run),
    }
    return {
        "method": cell.method,
        "seed": cell.seed,
        "protocol": work.protocol.plain(),
        "configurations": work.protocol.configurations,
        **{of: {name: record[of][name] for name in ("AP", "AP50", "AP75")} for of in ("box", "mask")},
        "losses": losses,
        "hours": {stage: command and _hours(runner.starts(command)) for stage, command in commands.items()},
        "jobs": jobs,
        "supervised_epochs": supervised_epochs(cell.kind, work),
        "commands": [command.shell for command in commands.values() if command],
        "environment": {**environment("mmdet", "mmcv", "mmengine", "pycocotools"), "threads": 1},  # of the commands
    }


@functools.cache
def supervised_epochs(kind: str | None, work: Work) -> float:
    """Epochs of supervised training, at the same size of images, that have as many FLOPs as a pre-training."""
    return work.protocol.epochs * flops(kind, work) / flops("supervised", work) if kind else 0.0


def _hours(starts: Sequence[metrics.Record]) -> dict[str, float]:
    """Of all starts of a command: by the clock, and of all its processes."""
    wall, cpu = (sum(start[key] for start in starts) / 3600 for key in ("wall_s", "cpu_s"))
    return {"wall": wall, "cpu": cpu, "starts": len(starts)}


def _pretraining_loss(run: Path) -> float:
    """Mean of the last epoch."""
    if (run / LOSSES).exists():
        return float(json.loads((run / LOSSES).read_text())[-1])
    return float([r for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"][-1]["loss"])


def _finetuning_losses(run: Path) -> dict[str, float]:
    """The last ones that MMEngine recorded, means over its window of steps."""
    records = [r for log in sorted(run.glob("*/vis_data/scalars.json")) for r in metrics.read(log) if "loss" in r]
    last = max(records, key=itemgetter("step"))
    return {name: value for name, value in last.items() if name.startswith("loss")}


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
    work, start, failed = Work(folder, protocol), time.monotonic(), 0
    runner = Runner(folder / "commands")
    results.mkdir(parents=True, exist_ok=True)

    def do(cell: Cell, pretraining: Future[None] | None) -> None:
        if pretraining is not None:
            pretraining.result()
        runner.run(finetune(cell, work))
        write(results / f"{cell.name}.json", json.dumps(collect(cell, work, runner, jobs), indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool, Signals() as signals:
        pretrainings: dict[str, Future[None]] = {}
        pending: dict[Future[None], Cell] = {}
        for cell in missing:
            if cell.kind and cell.pretraining not in pretrainings:
                pretrainings[cell.pretraining] = pool.submit(runner.run, pretrain(cell, work))
            pending[pool.submit(do, cell, pretrainings.get(cell.pretraining))] = cell
        while pending and not signals.received:
            for future in wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                cell, error = pending.pop(future), future.exception()
                failed += error is not None
                what = f"{cell.name}: {f'failed: {error}' if error else 'done'}"
                print(progress_line(what, len(missing) - len(pending), len(missing), start), flush=True)
        if signals.received:
            print(f"not done: {', '.join(cell.name for cell in pending.values())}; the same command continues")
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
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
    others = sorted(name for name, each in environments.items() if _machine(each) != _machine(newest))
    if others:
        print(f"\nOn another machine or by other versions: {', '.join(others)}.")
    config = {"protocol": protocol.plain(), "cells": sorted(environments), "others": others}
    report = {"environment": newest, "config": config, "results": evaluated}
    write(results.with_name(f"{results.name}.json"), json.dumps(report, indent=1) + "\n")
    rows = {r["name"]: r for r in evaluated if r["kind"] == "method"}
    charts.points(
        "Box AP50 on the cut-out set: a point per seed, a line at the mean",
        {name: dict(zip(r["seeds"], r["box AP50"]["values"], strict=True)) for name, r in rows.items()},
        results.with_name(f"{results.name}.png"),
    )


def _machine(environment: Result) -> Result:
    return {key: value for key, value in environment.items() if key not in ("commit", "date")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="who takes part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of pre-training and fine-tuning")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="commands at once, a core for each")
    parser.add_argument("--report", action="store_true", help="only report the cells that exist")
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it works")
    parser.add_argument("--work", type=Path, help="folder of runs, default runs/transfer; with --quick, ...-quick")
    parser.add_argument("--results", type=Path, help="folder of the cells' files; with --quick, results in --work")
    options = parser.parse_args(arguments)
    protocol = Protocol.quick() if options.quick else Protocol()
    folder = options.work or ROOT / "runs" / ("transfer-quick" if options.quick else "transfer")
    results = options.results or (folder / "results" if options.quick else RESULTS)
    wanted = cells(options.methods, options.seeds)
    try:
        status = 0 if options.report else run(wanted, protocol, folder, results, options.jobs)
        publish(results, protocol)
    except ProtocolError as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
