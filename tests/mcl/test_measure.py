"""``mcl doctor --measure`` with real loaders and images; a GPU is simulated if only the recommendation is tested."""

import re
from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.settings import DataConfig
from mcl import cli, measure
from mcl.config import ConfigError

SMALL = ["montage.cells=1", "montage.ratios=[1,2]", "montage.images_per_canvas=[1,4]", "model.loss_weights=[1,1]"]


def test_engines_are_timed_on_the_images_given(few_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0, 0))
    busy, images, header, *timed, need, advice = measure.measure(
        ["mcl_r18_fpn_demo", f"data.root={few_photos}", "data.threads=1", "trainer.global_batch=16", *SMALL],
        seconds=0.01,
    )
    assert busy.startswith("the machine is busy: its load is 1000.0 on ")
    assert images == f"mcl_r18_fpn_demo, canvas 32 px, 32 images in {few_photos}"
    assert header == "one process of 1, 16 images a step, 1 loader thread; 0.01 s each after a warm-up"
    rates = {line.rsplit(maxsplit=2)[0].strip(): float(line.split()[-2].replace(",", "")) for line in timed}
    assert list(rates) == [f"data.engine={engine} data.device=cpu" for engine in ("fused", "stock", "torchvision")]
    assert re.fullmatch(r"images/s that training consumes per GPU, estimated by mcl budget: A100 [\d,]+", need)
    assert advice == f"recommended: {max(rates, key=rates.__getitem__)}"


@pytest.mark.parametrize(
    ("rates", "advice"),
    [
        ({"fused cpu": 1500.0, "fused gpu": 9000.0, "stock cpu": 100.0, "stock gpu": 4000.0}, "fused data.device=cpu"),
        ({"fused cpu": 1200.0, "fused gpu": 9000.0, "stock cpu": 100.0, "stock gpu": 4000.0}, "fused data.device=gpu"),
    ],
)
def test_cpus_load_where_they_keep_up_with_the_gpu(
    rates: dict[str, float], advice: str, few_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(source: Any, plan: Any, data: DataConfig, *_: Any) -> float:
        return rates.get(f"{data.engine} {data.device}", 0)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("dali_pipelines.loader._obstacle", lambda *_: None)
    monkeypatch.setattr(measure, "_images_per_s", rate)
    *header, said, took = measure.measure([f"data.root={few_photos}"])
    assert "one process of 8, 32 images a step" in [line.rsplit(",", 1)[0] for line in header]
    # An A100 does 2,470 images/s of a supervised step, times 28.7 / 13.466, and a step is 3.78 times as long.
    assert re.fullmatch(r"images/s that training consumes per GPU, .*: H100 1,39\d", said)
    assert took == f"recommended: data.engine={advice}"


def test_an_unavailable_device_is_named(few_photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.device: gpu needs a CUDA device"):
        list(measure.measure([f"data.root={few_photos}", "data.device=gpu", *SMALL]))


def test_help_names_the_default_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert f"(default: {measure.PRESET})" in " ".join(capsys.readouterr().out.split())


def test_keys_without_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("data.root=x", "mcl_r18_fpn_demo"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["doctor", word])
        assert capsys.readouterr().err == "mcl doctor: error: key=value arguments need --measure\n"


@pytest.mark.parametrize(
    "words", [["--measure", "nowhere.yaml", "data.root=x"], ["--measure", "data.root=x"], ["data.root=x", "--measure"]]
)
def test_a_preset_may_stand_before_the_keys(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(measure, "measure", lambda all_words: given.append(all_words) or [])
    cli.main(["doctor", *words])
    assert given == [[word for word in words if word != "--measure"]]
