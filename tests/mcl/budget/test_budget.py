"""The cost of a configuration, counted on tensors without memory, equals that of real steps."""

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import tile_boxes
from dali_pipelines.source import open_images
from mcl import cli, config
from mcl import commands as run
from mcl.budget import budget, count, hardware, show
from mcl.budget.memory import memory
from mcl.config import Config, ModelConfig, OptimConfig, TrainerConfig
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.optim import build_optimizer
from tests.conftest import ROOT, random_view

PRESETS = ROOT / "mcl" / "presets"
RECIPES = ROOT / "docs" / "recipes.md"
SMALL = ModelConfig(backbone="resnet18", width=16, head_convs=2, hidden=32)
TWO_LEVELS = dataclasses.replace(SMALL, loss_weights=(0.5, 0.5))
FEWER = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4), queries=(2, 1))


def preset(name: str, *words: str) -> Config:
    return config.load(PRESETS / f"{name}.yaml", words)


def configured(model: ModelConfig, geometry: Geometry, precision: Any = "fp32", recompute: bool = False) -> Config:
    return Config(model=model, montage=geometry, trainer=TrainerConfig(precision=precision, recompute=recompute))


def stage(epochs: int, flops: int, views: float) -> count.Stage:
    """A stage with steps of one image."""
    counted = count.Count({"backbone": flops}, {}, {}, {}, [], [], [], 0)
    return count.Stage(0, epochs, Geometry(), counted, images=1, accumulate=1, views=views)


def gflop_per_image(compute: str, geometry: Geometry) -> float:
    """GFLOP per image of a step with 128 images on each of 32 GPUs."""
    model = ModelConfig(compute=compute)  # type: ignore[arg-type]
    return count.step(configured(model, geometry), 128, 32).flops / 128 / 1e9


def test_flops_of_supervised_released_and_matched_steps() -> None:
    assert count.supervised("resnet50") / 1e9 == pytest.approx(24.3, rel=0.01)
    assert gflop_per_image("released", Geometry()) == pytest.approx(361.5, rel=0.01)
    assert gflop_per_image("matched", Geometry()) == pytest.approx(91.9, rel=0.01)


def test_counting_leaves_real_boxes_in_the_cache() -> None:
    """Counting must not leave boxes without memory in the cache that real montages use."""
    geometry = Geometry(cells=2, ratios=(1, 2), images_per_canvas=(1, 4))
    count.step(configured(TWO_LEVELS, geometry), 16, 1)
    assert type(tile_boxes(geometry, 16)) is Tensor


def test_what_autograd_keeps() -> None:
    """Relative to the released step, for ResNet-50 at 224 px with 32 images."""
    kept = {
        (compute, recompute): sum(
            count.step(configured(ModelConfig(compute=compute), Geometry(), recompute=recompute), 32, 1).saved.values()  # type: ignore[arg-type]
        )
        for compute, recompute in (("released", False), ("matched", False), ("matched", True))
    }
    assert kept["matched", False] <= 0.68 * kept["released", False]
    assert kept["matched", True] <= 0.35 * kept["released", False]


@pytest.mark.soak
def test_fewer_cells_with_all_queries() -> None:
    supervised = count.supervised("resnet50") / 1e9
    ratios = [gflop_per_image("matched", Geometry(cells=cells)) / supervised for cells in (7, 6, 5, 4, 3)]
    assert ratios == pytest.approx([3.78, 2.78, 1.93, 1.24, 0.70], rel=0.02)


def test_presets_keep_their_budgets() -> None:
    """A quarter of the queries at level 0, with 3 to 7 cells."""
    ratios: dict[int, float] = {}
    for name, most in ("mcl_r50_fpn_100e_budget", 1.0), ("mcl_r50_fpn_100e_budget_2x", 2.0):
        result = budget(preset(name, "trainer.precision=fp32"))  # the same count, but faster
        assert 0.97 * most < result["ratio_to_supervised"] <= most
        assert (result["gpus"], result["images_per_gpu"]) == (32, 128)
        stages = result["stages"]
        assert sum(s["epochs"] for s in stages) == 100
        mean = sum(s["epochs"] * s["gflop_per_image"] for s in stages) / 100
        parts = sum(p["forward"] + p["backward"] for p in result["parts"].values())
        assert mean == pytest.approx(result["gflop_per_image"]) == pytest.approx(parts)
        assert [sum(s["parts"].values()) for s in stages] == pytest.approx([s["gflop_per_image"] for s in stages])
        ratios |= {s["cells"]: s["ratio_to_supervised"] for s in stages}
    assert ratios == {
        cells: pytest.approx(ratio, rel=0.02) for cells, ratio in ((3, 0.41), (4, 0.73), (5, 1.14), (7, 2.22))
    }


def test_the_documents_say_what_the_presets_cost() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", RECIPES.read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == {path.stem for path in PRESETS.glob("*_[12]00e_*.yaml")}
    for name, flops, ratio in rows:
        result = budget(preset(name, "trainer.precision=fp32"))
        assert (flops, ratio) == (f"{result['gflop_per_image']:.1f}", f"{result['ratio_to_supervised']:.2f}"), name


@pytest.mark.soak
def test_the_documents_say_how_long_recipes_take() -> None:
    pattern = r"^\| ([\d,]+|1 million) \| (\d) GPUs? \| `(mcl_\w+) ?(.*?)` \|.* A100 ([\d.]+), H100 ([\d.]+) \|"
    rows = re.findall(pattern, RECIPES.read_text(), re.MULTILINE)
    assert len(rows) == 5
    for number, gpus, name, keys, *said in rows:
        images = int(number.replace(",", "").replace("1 million", "1000000"))
        times = budget(preset(name, *keys.split()), images=images, gpus=int(gpus))["time"]
        hours = {row["hardware"]: row["hours"] for row in times if row["gpus"] == int(gpus)}
        assert said == [f"{hours[gpu]:.2f}" for gpu in ("A100", "H100")], name


@pytest.mark.soak
def test_the_documents_say_what_fits_and_presets_fit_their_machines() -> None:
    pattern = r"^\| (`\w+_r50_.*`) \| ([\d.]+)(?: \(recomputes\))? \| ([\d.]+) \| ([\d.]+) \| (\d+) GB \|$"
    rows = re.findall(pattern, (ROOT / "docs" / "memory.md").read_text(), re.MULTILINE)
    documented = [(name, *said) for names, *said in rows for name in re.findall(r"`(\w+)`", names)]
    assert {name for name, *_ in documented} == {path.stem for path in PRESETS.glob("*_r50_*.yaml")}
    for name, *said, room in documented:
        settings = [], ["trainer.recompute=true"], ["trainer.recompute=false", "trainer.accumulate=2"]
        gpus = 1 if name.endswith("1gpu") else 8
        sizes = [memory(preset(name, *words), gpus)["total"] for words in settings]
        assert said == [f"{size / 1e9:.1f}" for size in sizes], name
        assert f"For {gpus} GPU{'s' if gpus > 1 else ''} of {room} GB." in (PRESETS / f"{name}.yaml").read_text()
        assert sizes[0] <= 1e9 * int(room)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_is_that_of_a_real_step(recompute: bool) -> None:
    """Compared with PyTorch's profiler, without oneDNN's scratch memory."""
    geometry = dataclasses.replace(FEWER, cells=2)
    cfg = configured(TWO_LEVELS, geometry, recompute=recompute)
    mcl = MCL(cfg).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    few = geometry.query_canvases(8)
    views = [dataclasses.replace(random_view(geometry, 8, seed), query_counts=few) for seed in (1, 2)]
    with profile(profile_memory=True) as profiler:
        mcl(*views).loss.backward()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = max(itertools.accumulate(sizes))
    assert 0.9 * peak <= count.step(cfg, 8, 1).peak <= 1.001 * peak


@pytest.mark.parametrize(
    ("compute", "precision"),
    [
        ("matched", "fp32"),
        pytest.param("matched", "bf16", marks=pytest.mark.soak),
        pytest.param("released", "fp64", marks=pytest.mark.soak),
    ],
)
def test_the_count_is_what_a_real_step_computes_and_saves(compute: str, precision: str) -> None:
    """FLOPs from PyTorch's counter and bytes from hooks, in a step on the CPU; backward is in fp32, where it is
    fast."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    cfg = configured(dataclasses.replace(TWO_LEVELS, compute=compute), FEWER, precision)
    mcl = MCL(cfg).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    few = FEWER.query_canvases(8)
    views = [dataclasses.replace(random_view(FEWER, 8, seed, dtype), query_counts=few) for seed in (1, 2)]
    known = {t.data_ptr() for t in [*mcl.parameters(), *mcl.buffers(), *(v.pixels for v in views)]}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved.setdefault(storage.data_ptr(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        with autocast:
            loss = mcl(*views).loss
        if precision == "fp32":
            loss.backward()
    counted = count.step(cfg, 8, 1)
    flops = counted.flops if precision == "fp32" else sum(counted.forward.values())
    assert flops == counter.get_total_flops() > 0
    assert sum(counted.saved.values()) == sum(t.untyped_storage().nbytes() for t in saved.values())


def test_parameters_are_counted_by_part() -> None:
    cfg = configured(TWO_LEVELS, FEWER)
    counted, mcl = count.step(cfg, 8, 1), MCL(cfg)
    assert sum(counted.parameters.values()) == sum(p.numel() for p in mcl.parameters())
    assert counted.parameters["momentum network"] == sum(p.numel() for p in mcl.target.parameters())
    assert counted.parameters["projector"] == sum(p.numel() for p in mcl.online.head.projector.parameters())
    assert counted.backward["momentum network"] == counted.saved["momentum network"] == 0
    canvases, tiles, width, hidden = 4 + 2, 4 + 2 * 4, TWO_LEVELS.width, TWO_LEVELS.hidden
    assert counted.forward["predictors"] == 2 * 2 * tiles * 2 * width * hidden
    assert counted.backward["predictors"] == 2 * counted.forward["predictors"]
    first = canvases * 16 * 16 * 64 * 3 * 7 * 7  # convolution without the gradient of its input
    assert counted.backward["backbone"] == 2 * counted.forward["backbone"] - 2 * 2 * first
    assert counted.forward["loss"] == counted.backward["loss"] == 2 * 2 * tiles * 8 * width
    elsewhere = count.step(cfg, 8, 3)  # three processes: three times the targets
    assert elsewhere.forward["loss"] == 3 * counted.forward["loss"]
    assert elsewhere.flops - counted.flops == 2 * 2 * counted.forward["loss"]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_memory_of_the_state_is_that_of_a_real_one(name: str) -> None:
    cfg = dataclasses.replace(configured(SMALL, Geometry(), "bf16"), optim=OptimConfig(name=name))  # type: ignore[arg-type]
    mcl = MCL(cfg)
    trainable = [p for p in mcl.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.ones_like(p)
    optimizer = build_optimizer(cfg.optim, mcl)
    optimizer.step()
    found = count.state(cfg)
    states = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    assert found["optimizer"] == sum(t.nbytes for t in states)
    assert found["gradients"] == sum(p.nbytes for p in trainable)
    whole = sum(t.nbytes for t in mcl.state_dict().values())
    assert found["parameters"] + found["momentum_network"] == whole
    assert found["momentum_network"] == sum(t.nbytes for t in mcl.target.state_dict().values())


def test_a_loaded_step_has_the_queries_of_its_configuration(photos: Path) -> None:
    cfg = preset("mcl_r18_fpn_demo", f"data.root={photos / 'train'}", "montage.queries=[4,1,2,1]", "data.threads=1")
    for view in run.batch(cfg, 0, open_images(cfg.data)):
        assert view.canvas_counts == (32, 8, 2, 1)
        assert view.query_counts == (8, 8, 1, 1)


def test_hours_are_of_the_epochs_and_the_images_of_the_configuration(tmp_path: Path, photos: Path) -> None:
    """Images come from the configuration, else from an index, which `mcl index` and every run write, else from
    ImageNet, as in the paper."""
    cfg = preset("mcl_r18_fpn_demo", f"data.root={photos / 'val'}", f"data.index={tmp_path}", f"output={tmp_path}")

    def said(cfg: Config, images: int | None = None) -> tuple[int, str, float, str]:
        result = budget(cfg, images=images)
        seconds = 3600 * result["time"][0]["hours"]
        epochs = seconds * result["time"][0]["images_per_s"] / result["images"]
        return result["images"], result["images_from"], epochs, show.tables(result)

    *found, text = said(cfg)
    assert found == [1_281_167, "ImageNet-1k", pytest.approx(20)]
    assert "Hours are for 20 epochs of 1,281,167 images, as many as ImageNet-1k has; for others give --images" in text
    open_images(cfg.data)
    *found, text = said(config.override(cfg, ["trainer.epochs=7"]))
    assert found == [66, "index", pytest.approx(7)]
    assert "Hours are for 7 epochs of 66 images, those of data.root.\n" in text
    *found, text = said(cfg, 1000)
    assert found == [1000, "--images", pytest.approx(20)]
    assert "Hours are for 20 epochs of 1,000 images.\n" in text


def test_times_of_one_supervised_step_are_the_published_ones() -> None:
    rows = hardware.times([stage(90, 5, views=1.0)], hardware.IMAGENET, 5.0, "bf16")
    by = {(row["hardware"], row["gpus"]): row for row in rows}
    assert len(by) == 9
    a100 = by["A100", 8]
    assert a100["images_per_s"] == pytest.approx(16_621)
    assert a100["hours"] == pytest.approx(90 * 1_281_167 / 16_621 / 3600)
    assert a100["gpu_hours"] == pytest.approx(8 * a100["hours"])
    assert by["A100", 32]["images_per_s"] == pytest.approx(4 * 16_621)
    assert by["V100", 1]["images_per_s"] == pytest.approx(1_200)
    assert by["H100", 1]["gate_share"] == pytest.approx(by["H100", 1]["images_per_s"] / 19_000)
    assert {row["kind"] for row in rows} == {"estimate"}
    assert all(row["source"] for row in rows)


@pytest.mark.parametrize(("precision", "hours"), [("fp16", 90 * 1_281_167 / 2_470), ("fp32", 90 * 1_281_167 / 938)])
def test_times_depend_on_the_precision(precision: str, hours: float) -> None:
    rows = hardware.times([stage(90, 5, views=1.0)], hardware.IMAGENET, 5.0, precision)
    assert rows[0]["hardware"] == "A100"
    assert rows[0]["hours"] == pytest.approx(hours / 3600)
    assert ("TF32" in rows[0]["source"]) == (precision == "fp32")
    assert {row["hardware"] for row in rows} == ({"A100"} if precision == "fp32" else {"A100", "H100", "V100"})


def test_without_published_throughputs_there_are_no_estimates() -> None:
    said = budget(preset("mcl_r18_fpn_demo", "trainer.precision=fp64", "trainer.global_batch=64"), gpus=2)
    assert said["time"] == said["communication"]["scales"] == []
    assert "No estimate of hours: no throughput in fp64 has been published" in show.tables(said)


def test_the_loader_must_feed_the_fastest_stage() -> None:
    stages = [stage(50, 1, views=0.5), stage(50, 4, views=3.0)]
    row = next(
        r for r in hardware.times(stages, hardware.IMAGENET, 1.0, "bf16") if (r["hardware"], r["gpus"]) == ("H100", 1)
    )
    fastest = 2_470 * 28.7 / 13.466
    assert row["images_per_s"] == pytest.approx(fastest / 2.5)
    assert row["loader_images_per_s_per_gpu"] == pytest.approx(fastest)
    assert row["gate_share"] == pytest.approx(fastest / 19_000)  # decoding is never faster than with one view


def test_loading_on_cpus_is_what_was_benchmarked(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "loader.json"
    assert hardware.loading_on_cpu(path.with_name("none.json")) is None
    path.parent.mkdir(parents=True)
    shares = {"decode": 0.25, "augmentation": 0.7, "wait": 0.05}
    fused = [
        {"contender": "fused", "threads": t, "images_per_s": r, "shares": shares} for t, r in ((1, 100.0), (2, 160.0))
    ]
    others = [{"contender": "stock", "threads": 4, "images_per_s": 9.0}, {"name": "ratio"}]
    path.write_text(json.dumps({"environment": {"cpu": "EPYC"}, "results": [*fused, *others]}))
    found = hardware.loading_on_cpu(path)
    views = 2 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
    assert found == {
        "decode_s": 0.25 / 80,
        "view_s": pytest.approx(0.75 / 80 / views),
        "views": views,
        "threads": 2,
        "cpu": "EPYC",
        "source": "benchmarks/results/loader.json",
    }
    for shown, expected in ((views, 1), (3 * views, 0.25 + 3 * 0.75), (0.0, 0.25)):  # the first is the measured one
        row = hardware.times([stage(1, 1, shown)], hardware.IMAGENET, 80 / 2_470, "bf16", cpu=found)[0]
        assert row["loader_images_per_s_per_gpu"] == pytest.approx(80)
        assert row["cpu_cores_per_gpu"] == pytest.approx(expected)


def test_cores_to_load_follow_the_pixels_of_each_stage() -> None:
    """The first stage needs more images per second, the second more pixels."""
    cpu = {"decode_s": 1e-3, "view_s": 1e-3}
    stages = [stage(50, 1, views=0.5), stage(50, 2, views=3.0)]
    row = next(
        r
        for r in hardware.times(stages, hardware.IMAGENET, 1.0, "bf16", cpu=cpu)
        if (r["hardware"], r["gpus"]) == ("A100", 1)
    )
    assert row["cpu_cores_per_gpu"] == pytest.approx(max(2_470 * 1.5e-3, 1_235 * 4e-3))


def record_run(cfg: Config, device: str, rates: list[float]) -> None:
    """A run folder with these speeds, with one record per epoch."""
    state: dict[str, Any] = {key: {} for key in ("optimizer", "scaler", "loader", "rng")} | {"files": "", "step": 1}
    state |= {"config": config.to_dict(cfg), "model": {"weight": torch.zeros(1)}}
    state["environment"] = {"device": device, "world_size": 8}
    checkpoint.save(cfg.run_folder / "checkpoints", state, 1)
    records = [{"kind": "train", "step": i, "epoch": i + 1.0, "images_per_s": r} for i, r in enumerate(rates)]
    lines = [json.dumps(r) for r in [*records, {"kind": "eval", "name": "knn", "step": 9}]]
    (cfg.run_folder / "metrics.jsonl").write_text("\n".join(lines))


def test_measurements_take_the_place_of_estimates(tmp_path: Path) -> None:
    words = [f"output={tmp_path}", "montage.schedule=[[2, 4]]"]
    cfg = preset("mcl_r18_fpn_demo", *words)
    flops = {2: 1.0, 4: 4.0}
    assert hardware.measurement(cfg, flops) is None
    record_run(cfg, "NVIDIA A100-SXM4-80GB", [1.0, 400.0, 100.0, 101.0, 99.0])
    found = hardware.measurement(cfg, flops)
    assert found is not None
    assert (found.flops_per_s, found.hardware, found.gpus) == (400.0, "NVIDIA A100-SXM4-80GB", 8)
    rows = hardware.times([stage(20, 4, views=1.0)], hardware.IMAGENET, 5.0, "bf16", found)
    assert (rows[0]["kind"], rows[0]["hardware"], rows[0]["images_per_s"]) == ("measured", found.hardware, 100.0)
    assert rows[0]["source"] == str(tmp_path / "demo" / "metrics.jsonl")
    assert [r["gpus"] for r in rows if r["hardware"] == "A100"] == [1, 32]
    assert hardware.measurement(config.override(cfg, ["trainer.epochs=9"]), flops) == found
    for word in ("model.width=32", "trainer.recompute=true", "trainer.accumulate=2"):
        assert hardware.measurement(config.override(cfg, [word]), flops) is None
    first = hardware.measurement(cfg, {2: 1.0})  # from a shorter run, whose schedule ends earlier
    assert first is not None
    assert first.flops_per_s == pytest.approx(200.5)
    assert hardware.measurement(cfg, {7: 1.0}) is None


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


@pytest.mark.usefixtures("no_dali")
def test_json_is_all_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without images and DALI; also writes a picture."""
    words = ["data.root=", f"output={tmp_path}", "montage.queries=[2,1,1,1]", "trainer.precision=bf16"]
    words.append("trainer.accumulate=auto")
    picture = tmp_path / "budget.png"
    cli.main(["budget", str(PRESETS / "mcl_r18_fpn_demo.yaml"), *words, "--json", "--plot", str(picture)])
    printed = capsys.readouterr()
    result: dict[str, Any] = json.loads(printed.out)
    supervised = result["supervised"]["gflop_per_image"]
    assert result["ratio_to_supervised"] == pytest.approx(result["gflop_per_image"] / supervised)
    assert (result["supervised"]["model"], result["gpus"], result["images_per_gpu"]) == ("resnet18", 1, 32)
    assert result["memory"]["total"] == sum(v for k, v in result["memory"].items() if k != "total")
    assert result["memory"]["canvases"] == (2 + 2 + 1) * 2 * (32 + 8 + 2 + 1) * 3 * 64 * 64 * 2
    assert result["memory"]["activations"] == result["stages"][0]["saved_bytes"]
    assert result["loader"]["views"] == pytest.approx(2 * (1 + 1 / 4 + 1 / 16 + 1 / 64) * (64 / 224) ** 2)
    assert picture.read_bytes().startswith(b"\x89PNG")

    documented = Path(sys.modules["mcl.budget.cost"].__file__ or "").read_text()
    assert all(key in documented for key in [*result, *result["time"][0], *result["memory"], *result["stages"][0]])

    text = show.tables(result)
    for part in count.PARTS:
        assert f"\n{part} " in text
    assert f"{result['ratio_to_supervised']:.2f} times a step of supervised resnet18 at 224 px" in text
    assert text.count("estimate") >= 9
    assert "derived, rough" in text
    assert max(map(len, text.splitlines())) < 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], r"trainer\.global_batch: 32 is not divisible by 3 processes"),
        (["--images", "0"], r"--images: 0 must be at least 1"),
        (["--gpus", "0"], r"--gpus: 0 must be at least 1"),
        (["--plot", "x.pdf"], r"--plot: x\.pdf must end in \.png"),
        (["--plot", "/no/where/x.png"], r"--plot: the folder /no/where does not exist"),
        (["montage.queries=[5,1,1,1]"], r"montage\.queries: one in 5 of the 32 canvases .* nearest legal: 4, 8"),
    ],
)
def test_errors_come_first(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["budget", str(PRESETS / "mcl_r18_fpn_demo.yaml"), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
