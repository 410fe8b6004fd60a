"""What pre-training is worth at equal cost: ``python -m benchmarks.transfer``. See docs/transfer.md.

A cell is a method, a cost and a seed: pre-train ResNet-18 until as many FLOPs are spent as a supervised run costs, or a
multiple of it; then classify the objects of two sets from frozen region features, and on request fine-tune the small
Mask R-CNN. What a cell has is written after every stage; the same command continues what was cut and does what is
missing. A study is a choice of cells, with a table of its own.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from benchmarks import charts
from benchmarks.common import ROOT, Result, environment, progress
from benchmarks.transfer_protocol import METHODS, Cell, Protocol, ProtocolError, Work
from benchmarks.transfer_report import Study, evaluate, gains, table
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

STUDIES = {
    "transfer": Study(
        ("random", "supervised", "moco_v2", "mcl", "budget"),
        (1, 4),
        (
            *((name, "random") for name in ("supervised", "moco_v2", "mcl", "budget")),
            *(("mcl", "supervised"), ("mcl", "moco_v2"), ("budget", "supervised"), ("budget", "moco_v2")),
            ("budget", "mcl"),
        ),
    ),
    "ablation": Study(
        (
            *("mcl", "budget", "stack", "same_level", "adjacent", "all", "mcl-backbone", "mcl-fpn", "budget-backbone"),
            *("queries", "canvases", "shared_crop", "cosine", "released"),
        ),
        (4,),
        (
            *((name, "mcl") for name in ("budget", "queries", "canvases", "stack", "same_level", "adjacent", "all")),
            *((name, "mcl") for name in ("shared_crop", "cosine", "released")),
            *(("mcl", "mcl-backbone"), ("mcl", "mcl-fpn"), ("mcl-fpn", "mcl-backbone"), ("budget", "budget-backbone")),
        ),
    ),
    "peers": Study(
        ("random", "mcl", "byol", "mcl_supervised"),
        (1,),
        (("byol", "random"), ("mcl_supervised", "random"), ("mcl", "byol"), ("mcl", "mcl_supervised")),
    ),
}


def cells(methods: Sequence[str], costs: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """In the order in which they run: cost after cost, seed after seed. Random weights have no cost."""
    each = [Cell(name, cost * METHODS[name].trains, seed) for cost in costs for seed in seeds for name in methods]
    return list(dict.fromkeys(each))


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
    """The pre-training of a cell; without one, what writes its initial weights."""
    if not METHODS[cell.method].trains:
        words = (work.protocol.preset, *work.protocol.words(cell.method), f"trainer.seed={cell.seed}")
        into = f"--initial={_checkpoints(cell, work)}"
        return Command(cell.pretraining, ("-m", "benchmarks.transfer_probe", *words, into))
    arguments = (
        *("-m", "mcl", "pretrain", work.protocol.preset),
        *work.protocol.words(cell.method, work.protocol.epochs(cell)),
        *(f"data.root={work.images}", "data.source=list", "data.allow_outside=true", "data.val_root="),
        *(f"data.index={work.folder / 'index'}", "data.threads=1", f"trainer.seed={cell.seed}", "trainer.device=cpu"),
        *("trainer.threads=1", "trainer.checkpoint_epochs=1", "trainer.keep=1", "evaluation.at_end=[]"),
        *("log.tensorboard=false", "log.preview=false"),
        *(f"name={cell.pretraining}", f"output={work.folder / 'pretrain'}"),
    )
    return Command(f"pretrain-{cell.pretraining}", arguments)


def _checkpoints(cell: Cell, work: Work) -> Path:
    return work.folder / "pretrain" / cell.pretraining / "checkpoints"


def _weights(cell: Cell, work: Work) -> Path:
    return _checkpoints(cell, work) / checkpoint.LAST


def probe(cell: Cell, work: Work, name: str) -> Command:
    """The region probe of a cell on a set."""
    arguments = (
        *("-m", "benchmarks.transfer_probe", work.protocol.preset, *work.protocol.words("random")),
        *(f"trainer.seed={cell.seed}", f"evaluation.regions={work.sets[name]}", f"data.index={work.folder / 'index'}"),
        *("data.threads=1", f"--output={_scores(cell, work, name)}"),
        *(f"--weights={_weights(cell, work)}", "--parts", *_probed(cell)),
    )
    return Command(f"probe-{cell.name}-{name}", arguments)


def _probed(cell: Cell) -> list[str]:
    """The probe has no use for the head."""
    return [part for part in METHODS[cell.method].parts if part != "head"]


def _scores(cell: Cell, work: Work, name: str) -> Path:
    return work.folder / "probe" / f"{cell.name}-{name}.json"


def finetune(cell: Cell, work: Work) -> Command:
    """The fine-tuning of a cell, from what its pre-training leaves, and its evaluation."""
    parts = ",".join(METHODS[cell.method].parts)
    arguments = (
        *("-m", "mcl", "finetune", work.protocol.detector, *work.protocol.finetuning),
        *(f"weights={_weights(cell, work)}", f"parts=[{parts}]"),
        *(f"data.root={work.protocol.detection}", f"randomness.seed={cell.seed}"),
        *(f"name={cell.name}", f"output={work.folder / 'finetune'}"),
    )
    return Command(f"finetune-{cell.name}", arguments)


def measured(cell: Cell, work: Work, stage: str) -> tuple[Command, Callable[[], Result]]:
    """What measures a stage, ``finetuning`` or the name of a set, and what reads the measures then."""
    if stage == "finetuning":
        file = ROOT / work.folder / "finetune" / cell.name / "ap.json"

        def average_precision() -> Result:
            last = json.loads(file.read_text())[-1]
            return {of: {name: last[of][name] for name in ("AP", "AP50", "AP75")} for of in ("box", "mask")}

        return finetune(cell, work), average_precision
    scores = ROOT / _scores(cell, work, stage)
    return probe(cell, work, stage), lambda: json.loads(scores.read_text())


def execute(command: Command, folder: Path, running: set[int]) -> None:
    """Starts or continues a command that is not done yet, and waits for it.

    It writes ``<name>.log`` and ``<name>.jsonl``: a line for each start, with the ``command``, its ``exit`` code, the
    seconds by the clock, ``wall_s``, and those of all its processes, ``cpu_s``.

    Args:
        folder: of log and record.
        running: process ids of all running commands.

    Raises:
        ProtocolError: the folder knows another command of that name.
        RuntimeError: it failed.
    """
    before = starts(command, folder)
    if other := next((start["command"] for start in before if start["command"] != command.shell), None):
        raise ProtocolError(f"{folder}: of another protocol: {command.name} was {other}; give another --work")
    if any(start["exit"] == 0 for start in before):
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
    seconds = {"wall_s": time.monotonic() - begun, "cpu_s": usage.ru_utime + usage.ru_stime}
    record = {"exit": code, **seconds, "command": command.shell}
    with open(path.with_suffix(".jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
    if code:
        tail = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        raise RuntimeError("\n    ".join([f"{command.name}: exit code {code}; the end of {path}:", *tail]))


def starts(command: Command, folder: Path) -> list[metrics.Record]:
    """The record of a command."""
    return metrics.read(folder / f"{command.name}.jsonl")


def _hours(each: Sequence[metrics.Record]) -> dict[str, float]:
    """Of all starts of a command: by the clock, and of all its processes."""
    wall, cpu = (sum(start[key] for start in each) / 3600 for key in ("wall_s", "cpu_s"))
    return {"wall": wall, "cpu": cpu, "starts": len(each)}


def begun(cell: Cell, work: Work) -> Result:
    """The result of a cell before its first measure."""
    epochs = work.protocol.epochs(cell)
    return {
        "method": cell.method,
        "cost": cell.cost,
        "seed": cell.seed,
        "epochs": epochs,
        "supervised_epochs": work.protocol.spent(cell.method, epochs) if epochs else 0.0,
        "measures": {},
        "hours": {},
        "commands": {},
    }


def read(folder: Path, protocol: Protocol) -> dict[Cell, Result]:
    """The results in a folder.

    Raises:
        ProtocolError: one is of another protocol, or was probed on other images than the others.
    """
    results, sets = {}, dict[str, tuple[int, ...]]()
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        cell = Cell(result["method"], result["cost"], result["seed"])
        protocol.check(cell, result, path)
        for name, record in result["measures"].items():
            own = tuple(record.get(of, 0) for of in ("images", "boxes", "classes", "annotations"))
            if sets.setdefault(name, own) != own:
                raise ProtocolError(f"{path}: {name} is another set than in other cells; move it away")
        results[cell] = result
    return results


def run(wanted: Sequence[Cell], stages: Sequence[str], work: Work, results: Path, jobs: int) -> int:
    """Measures what the cells lack, until all is done or failed, or SIGINT or SIGTERM comes.

    The signal is passed on, and what runs then saves and ends.

    Args:
        wanted: in the order in which they run.
        stages: what is measured.
        results: of the cells' files.
        jobs: commands at once.

    Returns:
        The exit status: 0 unless a cell failed or a signal came.

    Raises:
        ProtocolError: folder or results are of another protocol.
    """
    there = read(results, work.protocol)
    lacking = {cell: [s for s in stages if s not in there.get(cell, {"measures": ()})["measures"]] for cell in wanted}
    missing = [cell for cell, own in lacking.items() if own]
    failed, logs, running = 0, ROOT / work.folder / LOGS, set[int]()
    shared = {cell.pretraining: threading.Lock() for cell in missing}
    for made in (logs, results):
        made.mkdir(parents=True, exist_ok=True)

    def do(cell: Cell) -> None:
        result = there.get(cell) or begun(cell, work)
        commands = {"pretraining": pretrain(cell, work)}
        with shared[cell.pretraining]:
            start(commands["pretraining"])
        for stage in lacking[cell]:
            commands[stage], measure = measured(cell, work, stage)
            start(commands[stage])
            result["measures"][stage] = measure()
            known = {name: starts(command, logs) for name, command in commands.items()}
            result["hours"] |= {name: _hours(each) for name, each in known.items() if each}
            result["commands"] |= {name: command.shell for name, command in commands.items()}
            result["protocol"] = work.protocol.deciding(cell, "finetuning" in result["measures"])
            versions = environment("mmdet", "mmcv", "mmengine", "pycocotools", "scipy")
            result |= {"jobs": jobs, "environment": {**versions, "threads": 1}}  # of the commands
            metrics.rewrite(results / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool, Signals() as signals:

        def start(command: Command) -> None:
            if signals.received:
                raise RuntimeError("stopped")
            execute(command, logs, running)

        pending = {pool.submit(do, cell): cell for cell in missing}
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
        while not all(future.done() for future in pending):
            for process in running.copy():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            time.sleep(_POLL)
    if pending:
        print(f"not done: {', '.join(cell.name for cell in pending.values())}; the same command continues")
    return 128 + signals.received if signals.received else int(failed > 0)


def publish(name: str, results: Path, protocol: Protocol) -> None:
    """Prints the tables of a study; writes ``<name>.json`` and ``<name>.png`` if a method of it alone was run.

    The environment is that of the newest cell; cells that had another machine or other versions are named.

    Raises:
        ProtocolError: a cell is of another protocol.
    """
    study, every = STUDIES[name], read(results, protocol)
    own = {*study.methods}.difference(*(other.methods for other in STUDIES.values() if other is not study))
    if not any(cell.method in own for cell in every):
        print(f"\n{name}: not run")
        return
    there = {cell: result for cell, result in every.items() if cell.method in study.methods}
    evaluated = evaluate(list(every.values()), study, own)
    print(f"\n{name}\n\n{table(evaluated)}")
    environments = {cell.name: result["environment"] for cell, result in there.items()}
    newest = max(environments.values(), key=lambda each: str(each["date"]))
    same = [key for key in newest if key not in ("commit", "date")]
    others = sorted(name for name, each in environments.items() if any(each[key] != newest[key] for key in same))
    if others:
        print(f"\nOn another machine or by other versions: {', '.join(others)}.")
    report = {"environment": newest, "config": {"cells": sorted(environments), "others": others}, "results": evaluated}
    metrics.rewrite(results.with_name(f"{name}.json"), json.dumps(report, indent=1) + "\n")
    if panels := gains(evaluated):
        title = "Above random weights, by seed: mean and 95% interval, over the cost in supervised epochs"
        charts.curves(title, panels, results.with_name(f"{name}.png"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="transfer", help="which methods are compared")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="who takes part; default: all of the study")
    parser.add_argument("--costs", nargs="+", type=float, help="times a supervised run; default: those of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of pre-training and what follows")
    parser.add_argument("--voc", default="data/voc15", help="folder of photographs with boxes, probed if it is there")
    parser.add_argument("--finetune", action="store_true", help="fine-tune the detector, too")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="commands at once, a core for each")
    parser.add_argument("--report", action="store_true", help="only report the cells that exist, of all studies")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "transfer", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells' files")
    options = parser.parse_args(arguments)
    study, protocol, status = STUDIES[options.study], Protocol(), 0
    try:
        if not options.report:
            sets = {"cutouts": protocol.detection}
            if (ROOT / options.voc).is_dir():
                sets["voc15"] = options.voc
            else:
                print(f"{options.voc} does not exist: not probed; see docs/transfer.md")
            wanted = cells(options.methods or study.methods, options.costs or study.costs, options.seeds)
            stages = [*sets, *(["finetuning"] if options.finetune else [])]
            status = run(wanted, stages, Work(options.work, protocol, sets), options.results, options.jobs)
        for name in STUDIES if options.report else [options.study]:
            publish(name, options.results, protocol)
    except ProtocolError as error:
        sys.exit(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
