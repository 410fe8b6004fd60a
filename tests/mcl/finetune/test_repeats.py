"""Fine-tuning with several seeds: the table, its arithmetic, and a run that is interrupted in the second seed."""

import json
import os
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mcl import cli
from mcl.config import ConfigError
from mcl.finetune import finetune, hooks, metric, repeats
from mcl.signals import Interrupted
from tests.mcl.finetune.conftest import MINI
from tests.mcl.finetune.test_run import last_checkpoint, start, words

OURS = {0: (10.0, 5.0), 1: (12.0, 5.0), 2: (14.0, None)}
THEIRS = {1: (10.0, 4.0), 2: (14.0, 4.0), 0: (9.0, 4.0), 7: (11.0, None)}
"""Box AP and APs, by seed."""


def result(name: str, values: dict[int, tuple[float | None, ...]], **sections: str) -> dict[str, Any]:
    records = {
        seed: {"step": 6, "box": dict(zip(("AP", "APs", "APl"), (*v, None), strict=True))} for seed, v in values.items()
    }
    return {"name": name, **repeats.summary(records), "sections": sections}


def test_arithmetic_by_hand() -> None:
    """AP by seed is 1, 2, 0: 1 ± 1 / sqrt(3), and an interval of ± 4.3027 times that. APs of two seeds is 1, 1, and one
    seed has none."""
    ours = result("ours", OURS, model="a", weights="x")
    theirs = result("theirs", THEIRS, model="b", weights="y")
    assert ours["ap"]["box"]["AP"] == {"values": [10.0, 12.0, 14.0], "mean": 12.0, "sd": 2.0}
    assert ours["ap"]["box"]["APs"] == {"values": [5.0, 5.0, None], "mean": 5.0, "sd": 0.0}
    assert ours["ap"]["box"]["APl"] == {"values": [None] * 3, "mean": None, "sd": None}
    ours["compared"] = compared = {"with": "runs/other", **repeats.difference(ours, theirs)}
    assert (compared["seeds"], compared["differing"]) == ([0, 1, 2], ["model"])
    ap = compared["ap"]["box"]["AP"]
    assert (ap["mean"], ap["error"]) == (1, pytest.approx(3**-0.5))
    assert (ap["low"], ap["high"]) == pytest.approx((1 - 4.302653 * 3**-0.5, 1 + 4.302653 * 3**-0.5), abs=1e-5)
    assert compared["ap"]["box"]["APl"] is None
    assert repeats.table(ours, theirs) == (
        "| AP after 6 steps | ours, seeds 0, 1, 2 | runs/other, seeds 1, 2, 0, 7 | difference | its 95% interval |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| box AP | 12.0 ± 2.0 | 11.0 ± 2.2 | +1.0 ± 0.6 | -1.5 to +3.5 |\n"
        "| box APs | 5.0 ± 0.0 | 4.0 ± 0.0 | +1.0 ± 0.0 | +0.9 to +1.1 |\n"
        "| box APl | - | - | - | - |\n"
        "\n"
        "± is the standard deviation over seeds.\n"
        "For the difference, by seed (0, 1, 2), it is the standard error of the mean; the interval is that of a "
        "paired t-test.\n"
        "Besides weights, their configurations differ in model.\n"
    )


def test_one_seed_has_no_error() -> None:
    ours = result("ours", {3: (5.0, 1.0)})
    ours["compared"] = {"with": "o", **repeats.difference(ours, result("theirs", {3: (2.0, None)}))}
    assert repeats.table(ours, result("theirs", {3: (2.0, None)})).splitlines()[2:4] == [
        "| box AP | 5.0 | 2.0 | +3.0 | - |",
        "| box APs | 1.0 | - | - | - |",
    ]


def repeated(folder: Path, output: Path, name: str = "all", *more: str) -> list[str]:
    return words(folder, output, name, "train_cfg.max_iters=1", "default_hooks.checkpoint.interval=1", *more)


def check_table(run: Path, table: str, seeds: list[int]) -> None:
    """The table has the measurements of the runs of all seeds."""
    assert (run / repeats.TABLE).read_text() == table
    assert f"all, seeds {', '.join(map(str, seeds))} |" in table.splitlines()[0]
    records = [metric.read(run / f"seed-{seed}")[-1] for seed in seeds]
    said = json.loads((run / repeats.RESULTS).read_text())
    assert said["seeds"] == seeds
    for kind in ("box", "mask"):
        values = [record[kind]["AP50"] for record in records]
        found = said["ap"][kind]["AP50"]
        assert (found["values"], found["mean"]) == (values, pytest.approx(statistics.fmean(values)))


def test_stopped_in_the_second_and_continued(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs do not change. A comparison with the former files finds no difference."""
    run, arguments = tmp_path / "all", repeated(folder, tmp_path)

    def signalled(self: hooks.Repeat, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Repeat, "before_train_iter", signalled)
        with pytest.raises(Interrupted):
            finetune(MINI, arguments, 2)
    assert "seeds 0 |" in (run / repeats.TABLE).read_text()
    done = (run / "seed-0" / "iter_1.pth").stat().st_mtime_ns
    table = finetune(MINI, arguments, 2, run)
    assert (run / "seed-0" / "iter_1.pth").stat().st_mtime_ns == done
    check_table(run, table, [0, 1])
    assert f"| {run}, seeds 0 | difference |" in table
    assert "| +0.0 | - |" in table
    with pytest.raises(ConfigError, match=r"^--compare: .*all has the seeds 0, 1, none of 5, 6; set randomness\.seed"):
        finetune(MINI, [*arguments, "randomness.seed=5"], 2, run)


def test_time_left_is_that_of_all_repeats() -> None:
    """In the second of three runs of 10 steps, after 4 steps: 6 steps of 2 s, and 10 more."""
    info = {"eta": 12.0}

    class Runner:
        max_iters, iter = 10, 3

        class message_hub:
            get_info = info.get
            update_info = info.__setitem__

    hook = hooks.Repeat(1, 3)
    hook.after_train_iter(Runner, 3)
    assert info["eta"] == 6 * 2 + 10 * 2
    Runner.iter, info["eta"] = 9, 0.0  # after the last step
    hook.after_train_iter(Runner, 9)
    assert info["eta"] == 10 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], r"^mcl finetune: error: --repeats: must be at least 1"),
        (["--repeats", "2", "test=true"], r"^mcl finetune: error: --repeats: .*without test=true"),
        (["--compare", "x"], r"^mcl finetune: error: --compare: compares repeats; set --repeats"),
        (["--repeats", "2", "--compare", "/no/where"], r"error: --compare: /no/where has no repeats\.json"),
    ],
)
def test_errors(options: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["finetune", str(MINI), *options])
    assert re.search(message, capfd.readouterr().err.splitlines()[-1])


@pytest.mark.soak
def test_killed_in_the_second_of_three_and_continued(folder: Path, tmp_path: Path) -> None:
    """By SIGKILL; the interrupted run has the weights of an uninterrupted one."""
    process = start([*repeated(folder, tmp_path), "train_cfg.max_iters=4", "--repeats", "3"])
    run = tmp_path / "all"
    while not last_checkpoint(run / "seed-1"):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    arguments = [*repeated(folder, tmp_path), "train_cfg.max_iters=4"]
    check_table(run, finetune(MINI, arguments, 3), [0, 1, 2])
    finetune(MINI, [*arguments, "name=alone", "randomness.seed=1"])
    ours, theirs = (torch.load(f / "iter_4.pth")["state_dict"] for f in (run / "seed-1", tmp_path / "alone"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
