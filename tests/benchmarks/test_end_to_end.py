"""Benchmark of loader, model and both: results computed from given times, and a short real run."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import end_to_end
from dali_pipelines.source import SourceError
from mcl.config import ConfigError

SMALL = ["model.width=16", "model.head_convs=1", "model.hidden=32", "trainer.log_every=1", "trainer.device=cpu"]


def record(step: int, images_per_s: float, **shares: float) -> dict[str, Any]:
    return {"step": step, "images_per_s": images_per_s, **shares}


def test_results_by_hand() -> None:
    measured = {"loader": [0.1, 0.1, 0.3], "model": [0.4, 0.4, 0.4], "together": [0.5, 0.8, 0.625]}
    records = [
        # Ignored: includes work that is done once.
        record(10, 1.0, data_wait=1.0, forward=0.0, backward=0.0, optimizer=0.0),
        record(20, 32.0, data_wait=0.1, forward=0.2, backward=0.5, optimizer=0.1),  # 10 steps of 32 images: 10 s
        record(25, 8.0, data_wait=0.4, forward=0.2, backward=0.2, optimizer=0.1),  # 5 steps: 20 s
    ]
    results = {r["name"]: r for r in end_to_end.evaluate(measured, records, images=32)}
    together = results["together"]
    assert (results["loader"]["images_per_s"], results["model"]["images_per_s"]) == (10, 2.5)
    assert together["images_per_s"] == pytest.approx(1.6)
    assert together["of_turns"] == pytest.approx(1.6 / (1 / (1 / 10 + 1 / 2.5)))
    assert together["of_slower"] == pytest.approx(1.6 / 2.5)
    assert together["bound_by"] == "model"
    assert results["trainer"]["shares"] == pytest.approx(
        {"data_wait": 0.3, "forward": 0.2, "backward": 0.3, "optimizer": 0.1, "overhead": 0.1}
    )
    assert results["trainer"]["n"] == 2
    table = end_to_end.table(list(results.values()))
    assert "| together | 1.6 | 48% | 80% | 64% | model |" in table
    assert "|  | 30.0% | 20.0% | 30.0% | 10.0% | 10.0% |" in table

    slow = measured | {"loader": [2.0]}
    assert {r.get("bound_by") for r in end_to_end.evaluate(slow, records, 32)} == {None, "loader"}


def test_a_graph_is_one_phase() -> None:
    records = [record(n, 1.0, data_wait=0.25, graph=0.5, optimizer=0.125) for n in (1, 2)]
    shares = end_to_end.shares(records, 32)
    assert shares == {"data_wait": 0.25, "graph": 0.5, "optimizer": 0.125, "overhead": 0.125}


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        ([], 7, r"--steps: 7 make a single record; use more than trainer\.log_every=7"),
        (["model.widht=16"], 0, "model.widht: no such key; did you mean model.width"),
    ],
)
def test_wrong_options_are_named(words: list[str], steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        end_to_end.prepare(end_to_end.DEMO, words, steps)


def test_options_lead_to_the_configuration() -> None:
    words = ["montage.cells=3", "montage.schedule=[[1, 4]]", "trainer.log_every=5"]
    cfg, steps = end_to_end.prepare(end_to_end.DEMO, words, 0)
    assert (cfg.montage.cells, cfg.montage.schedule, cfg.evaluation.at_end) == (3, (), ())
    assert steps == 5 * end_to_end.RECORDS
    assert end_to_end.prepare(end_to_end.DEMO, words, 6)[1] == 6


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.root: nowhere does not exist"):
        end_to_end.main(["--data", "nowhere", "--repeat", "1"])


@pytest.mark.usefixtures("thin_backbone")
def test_a_run_reports_what_it_measured(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "end.json", tmp_path / "end.png"
    quick = ["--data", str(photos / "train"), "--repeat", "1", "--seconds", "0.1", "--steps", "3"]
    before = set(threading.enumerate())
    arguments = [str(end_to_end.DEMO), *quick, *SMALL, "trainer.checkpoint_epochs=0.3"]
    end_to_end.main([*arguments, "--json", str(file), "--plot", str(plot)])
    left = set(threading.enumerate()) - before
    # Tqdm keeps this thread until the process ends.
    assert not [thread for thread in left if thread.name != "tqdm_monitor"]

    results = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    assert list(results) == ["loader", "model", "together", "trainer"]
    rates = {name: r["images_per_s"] for name, r in results.items()}
    assert all(r["seconds"] * rates[name] == pytest.approx(1) for name, r in results.items())
    together = results["together"]
    assert together["of_slower"] == pytest.approx(rates["together"] / min(rates["loader"], rates["model"]))
    assert together["bound_by"] == min(("loader", "model"), key=rates.__getitem__)
    shares = results["trainer"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())
    out, err = capsys.readouterr()
    assert "warm-up, loader: 0 of 6 done" in err
    assert "trainer, 3 steps" in err
    assert "saved" in out  # the run writes checkpoints
    assert "| together |" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
