"""Results of cells: made of what their tasks left behind, kept one per file, read back under the same protocol."""

import functools
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Result, environment
from benchmarks.transfers import cost, methods, tasks
from benchmarks.transfers.methods import METHODS, Cell
from benchmarks.transfers.protocol import ROOT, Protocol, ProtocolError, Work, write
from benchmarks.transfers.tasks import Task
from benchmarks.transfers.train import LOSSES
from mcl.records import metrics

_MEASURES = ("AP", "AP50", "AP75")


def read(folder: Path, protocol: Protocol) -> dict[Cell, Result]:
    """The results in a folder.

    Raises:
        ProtocolError: one is of another protocol, or of other configuration files.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        protocol.check(result["protocol"], path)
        for name, digest in protocol.configurations().items():
            if result["configurations"].get(name) != digest:
                raise ProtocolError(f"{path}: made with another {name} than there is now; move it away")
        results[Cell(result["method"], result["seed"])] = result
    return results


def plan(cells: Sequence[Cell], work: Work, results: Path, jobs: int) -> list[Task]:
    """Tasks of cells, pre-trainings before the first cell that needs them.

    Args:
        results: folder for the cells' files.
        jobs: how many run at once, for the record.
    """
    planned: dict[str, Task] = {}
    for cell in cells:
        needs = None
        if cell.pretraining:
            needs = f"pretrain-{cell.pretraining}"
            planned.setdefault(needs, Task(needs, tuple(methods.pretrain(cell, work))))
        name = f"finetune-{cell.name}"
        planned[name] = Task(
            name, tuple(methods.finetune(cell, work)), needs, functools.partial(_keep, cell, work, results, jobs)
        )
    return list(planned.values())


def _keep(cell: Cell, work: Work, results: Path, jobs: int) -> None:
    results.mkdir(parents=True, exist_ok=True)
    write(results / f"{cell.name}.json", json.dumps(collect(cell, work, jobs), indent=1) + "\n")


def collect(cell: Cell, work: Work, jobs: int) -> Result:
    """The result of a cell whose tasks are done."""
    folder = ROOT / work.folder
    run = folder / "finetune" / cell.name
    record = json.loads((run / "ap.json").read_text())[-1]
    kind, pretraining = METHODS[cell.method].pretraining, cell.pretraining
    commands = [methods.finetune(cell, work)]
    if pretraining:
        commands.insert(0, methods.pretrain(cell, work))
    return {
        "method": cell.method,
        "seed": cell.seed,
        "protocol": work.protocol.plain(),
        "configurations": work.protocol.configurations(),
        **{of: {name: record[of][name] for name in _MEASURES} for of in ("box", "mask")},
        "losses": {
            "pretraining": _pretraining_loss(folder / "pretrain" / pretraining) if pretraining else None,
            "finetuning": _finetuning_losses(run),
        },
        "hours": {
            "pretraining": tasks.hours(folder / "tasks", f"pretrain-{pretraining}") if pretraining else None,
            "finetuning": tasks.hours(folder / "tasks", f"finetune-{cell.name}"),
        },
        "jobs": jobs,
        "supervised_epochs": _supervised_epochs(kind, work),
        "commands": [methods.shell(command) for command in commands],
        "environment": _environment(),
    }


@functools.cache
def _supervised_epochs(kind: str | None, work: Work) -> float:
    return cost.supervised_epochs(kind, work)


def _pretraining_loss(run: Path) -> float:
    """Mean of the last epoch."""
    if (run / LOSSES).exists():
        return float(json.loads((run / LOSSES).read_text())[-1])
    records = [record for record in metrics.read(run / "metrics.jsonl") if record["kind"] == "train"]
    return float(records[-1]["loss"])


def _finetuning_losses(run: Path) -> dict[str, float]:
    """The last ones that MMEngine recorded, means over its window of steps."""
    logs = sorted(run.glob("*/vis_data/scalars.json"))
    records = [record for log in logs for record in metrics.read(log) if "loss" in record]
    last: dict[str, Any] = max(records, key=lambda record: record["step"])
    return {name: value for name, value in last.items() if name.startswith("loss")}


def _environment() -> dict[str, Any]:
    """That of the commands: they have one thread each."""
    here = environment()
    libraries = ("mmdet", "mmcv", "mmengine", "pycocotools")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {**here, "threads": 1, "versions": {**here["versions"], **versions}}
