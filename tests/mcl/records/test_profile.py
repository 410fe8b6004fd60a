"""The profile of a run, which does not change the run itself."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mcl import config
from mcl.config import Config
from mcl.records.metrics import read
from mcl.records.profile import idle_share
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.mcl.tiny import STEPS, TINY, equal


def configure(tmp_path: Path, photos: Path, *words: str) -> Config:
    own = [f"output={tmp_path}", f"data.root={photos / 'val'}", "trainer.global_batch=16", "trainer.log_every=1"]
    return config.override(config.from_dict(TINY), [*own, *words])


def events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def test_some_steps_are_traced_and_the_run_goes_on(tmp_path: Path, photos: Path) -> None:
    """Two of eight steps, including our operators; the final weights are those of a run without profile."""
    ends = {}
    for words in ["name=plain"], ["name=watched", "trainer.profile=2"]:
        cfg = configure(tmp_path, photos, *words)
        Trainer(cfg).fit()
        ends[cfg.name] = checkpoint.load(cfg.run_folder / "checkpoints" / "last.pt")
        assert (cfg.run_folder / "profile").exists() == (cfg.name == "watched")
        assert [r["step"] for r in read(cfg.run_folder / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    assert equal(ends["plain"]["model"], ends["watched"]["model"])

    folder = tmp_path / "watched" / "profile"
    names = [str(event.get("name")) for event in events(folder / "trace.json.gz")]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#5", "ProfilerStep#6"}
    operators = {"mcl::batch_norm_stats_alone", "mcl::region_pool", "mcl::ema_", "aten::convolution", "aten::addmm"}
    assert operators <= set(names)
    table = (folder / "table.txt").read_text()
    assert all(f" {operator} " in table for operator in operators)
    assert "GPU" not in table
    assert idle_share(folder / "trace.json.gz") is None


def test_a_run_may_be_too_short(tmp_path: Path, photos: Path) -> None:
    cfg = configure(tmp_path, photos, "trainer.epochs=1", "trainer.profile=2")
    Trainer(cfg).fit()
    assert not (cfg.run_folder / "profile").exists()
    assert (
        "trainer.profile: no profile, since the run ended within its first 5 steps"
        in (cfg.run_folder / "train.log").read_text()
    )


def test_idle_share_of_overlapping_streams(tmp_path: Path) -> None:
    """From 100 to 200 us: busy from 100 to 130 (which includes a copy), from 150 to 160, and from 190 on."""
    spans = [("kernel", 150, 10), ("kernel", 100, 30), ("gpu_memcpy", 105, 10), ("gpu_memset", 190, 10)]
    others = [("cpu_op", 0, 1000), ("user_annotation", 0, 1000), ("gpu_user_annotation", 100, 100)]
    listed = [{"ph": "X", "cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in [*spans, *others]]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*listed, {"ph": "M", "name": "process_name"}]}, file)
    assert idle_share(path) == pytest.approx(0.5)
