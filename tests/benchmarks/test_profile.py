"""The profile of a step: results computed from given kernels and spans, and a short real run."""

import json
from pathlib import Path

import pytest

from benchmarks import profile
from benchmarks.end_to_end import DEMO


def test_results_by_hand() -> None:
    kernels = [
        *(("ampere_bf16_gemm", 300.0, 4), ("void mcl::cuda::batch_norm_apply<float>", 100.0, 20)),
        *(("make_tiles", 50.0, 2), ("at::native::vectorized_elementwise_kernel", 50.0, 8)),
        *(("ncclDevKernel_AllReduce", 0.0, 2),),
    ]
    spans = [(100.0, 300.0), (150.0, 200.0), (250.0, 400.0), (600.0, 700.0)]  # busy for 300 and 100 us
    step, *rows = profile.evaluate(kernels, spans, seconds=8e-4, steps=2, images=32)
    assert (step["seconds"], step["images_per_s"], step["idle"]) == (4e-4, pytest.approx(80_000), pytest.approx(0.5))
    assert list(step["kinds"].items())[:2] == [("convolutions and matrix products", 0.6), ("BatchNorm", 0.2)]
    assert (step["kinds"]["loading"], step["kinds"]["other"], step["kinds"]["communication"]) == (0.1, 0.1, 0)
    assert [(r["ms"], r["calls"], r["share"]) for r in rows[:2]] == [(0.15, 2, 0.6), (0.05, 10, 0.2)]
    assert len(rows) == 4
    table = profile.table([step, *rows], most=1)
    assert "| 50.0% | 60.0% | 20.0% |" in table
    assert table.splitlines()[-1] == "| ampere_bf16_gemm | 60.0% | 0.15 | 2 |"


@pytest.mark.usefixtures("thin_backbone")
def test_a_run_reports_what_it_measured(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.width=16", "model.head_convs=1", "model.hidden=32", "trainer.device=cpu", f"data.root={photos}/val"]
    profile.main([str(DEMO), *small, "--steps", "2", "--json", str(tmp_path / "profile.json")])
    step, *kernels = json.loads((tmp_path / "profile.json").read_text())["results"]
    assert 0 <= step["idle"] < 1
    assert sum(step["kinds"].values()) == pytest.approx(1)
    assert sum(r["share"] for r in kernels) == pytest.approx(1)
    assert "mcl::ema_" in {r["name"] for r in kernels}
    assert "| kernel | share |" in capsys.readouterr().out
