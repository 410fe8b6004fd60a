"""Steps that do not fit into memory are refused, made to fit, or explained; the memory of GPUs is simulated."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from dali_pipelines.loader import MontageLoader
from dali_pipelines.source import open_images
from mcl import cli, config, distributed
from mcl.budget.memory import memory as needed
from mcl.config import Config, ConfigError
from mcl.records.metrics import read
from mcl.train import checkpoint, memory
from mcl.train.memory import OutOfMemoryError
from mcl.train.trainer import Trainer
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY

GPU = torch.device("cuda", 0)
AUTO = "trainer.accumulate=auto"
NUMBERS = r"a step of 16 images per GPU needs [\d.]+ GB, but the GPU of rank 0 has [\d.]+ GB free"
OTHER_RUN = r"\(needs [\d.]+ GB; new runs only: it changes the batches that BatchNorm normalises\)"


@pytest.fixture
def tiny(tmp_path: Path, photos: Path) -> Config:
    """16, 4 canvases, which can be divided by 1, 2 and 4; but with 4, BatchNorm would have a single value per channel
    in level 1."""
    return configure(tmp_path, photos)


def configure(output: Path, photos: Path, *words: str) -> Config:
    own = [f"output={output}", f"data.root={photos / 'val'}", "trainer.global_batch=16"]
    return config.override(config.from_dict(TINY), [*own, *words])


def loader(cfg: Config, gpu: int | None = None, world: int = 1) -> MontageLoader:
    source = open_images(cfg.data)
    plan = cfg.plan(len(source), cfg.images_per_rank(world), world_size=world)
    return MontageLoader(source, plan, cfg.data, gpu=gpu)


def total(cfg: Config, *words: str, world: int = 1) -> int:
    """Bytes that a step needs, with a loader on the CPU."""
    return needed(config.override(cfg, words), world, 0)["total"]


def fit(cfg: Config, free: int) -> Config:
    """Checks the memory of a GPU with so many bytes, of which this process already uses some."""
    with (
        mock.patch("torch.cuda.mem_get_info", return_value=(free - 1000, 1 << 40)),
        mock.patch("torch.cuda.memory_reserved", return_value=1000),
    ):
        return memory.fit(cfg, GPU, loader(cfg))


def test_what_fits_to_the_byte_may_start(tiny: Config) -> None:
    need = total(tiny)
    assert fit(tiny, need) == tiny
    with pytest.raises(
        ConfigError, match=rf"^not enough GPU memory: {NUMBERS}; set trainer\.recompute=true \("
    ) as refusal:
        fit(tiny, need - 1)
    assert re.search(rf" or trainer\.accumulate=2 {OTHER_RUN}$", str(refusal.value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "room", "remedy"),
    [
        ((), ("trainer.accumulate=2",), rf"set trainer\.accumulate=2 {OTHER_RUN}"),
        (("trainer.recompute=true",), ("trainer.accumulate=2",), rf"set trainer\.accumulate=2 {OTHER_RUN}"),
        (
            (),
            ("trainer.recompute=true", "trainer.accumulate=2"),
            rf"set trainer\.recompute=true trainer\.accumulate=2 {OTHER_RUN}",
        ),
        ((), None, r"use more GPUs, or a smaller trainer\.global_batch"),
    ],
    ids=["without", "with", "both", "none"],
)
def test_the_refusal_names_what_fits(
    tiny: Config, words: tuple[str, ...], room: tuple[str, ...] | None, remedy: str
) -> None:
    """It names nothing else."""
    tiny = config.override(tiny, words)
    with pytest.raises(ConfigError, match=rf"; {remedy}$"):
        fit(tiny, 1 if room is None else total(tiny, *room))


def test_auto_is_the_smallest_legal_number_that_fits(tiny: Config) -> None:
    auto = config.override(tiny, [AUTO])
    assert fit(auto, total(tiny)) == tiny
    assert fit(auto, total(tiny) - 1) == config.override(tiny, ["trainer.accumulate=2"])
    with pytest.raises(ConfigError, match=rf"; set trainer\.recompute=true trainer\.accumulate=2 {OTHER_RUN}$"):
        fit(auto, total(tiny, "trainer.accumulate=2") - 1)
    with mock.patch("torch.cuda.mem_get_info", side_effect=AssertionError("a CPU has none")):
        assert memory.fit(auto, torch.device("cpu"), loader(auto)) == tiny


def test_a_loader_on_the_gpu_takes_its_part(tiny: Config) -> None:
    """It depends on the sizes of the images, and on those of the tiles, of 32 and 16 px."""
    tiny = config.override(tiny, ["data.engine=stock", "data.device=gpu"])
    of_gpu = loader(tiny, gpu=0)
    image = 3 * float(of_gpu.source.sizes.prod(1).mean())
    need = needed(tiny, 1, image)
    scratch = 16 * 2 * 4 * sum(2 * side * side + 50 * side for side in (32, 16))
    assert need["decoder"] == int(3 * 16 * image) + scratch
    assert needed(tiny, 1)["decoder"] == 3 * 16 * 3 * 500 * 375 + scratch  # no images are known
    assert needed(config.override(tiny, ["data.device=cpu"]), 1)["decoder"] == 0
    with mock.patch("torch.cuda.mem_get_info", return_value=(need["total"], 1 << 40)):
        assert memory.fit(tiny, GPU, of_gpu) == tiny
    with (
        mock.patch("torch.cuda.mem_get_info", return_value=(need["total"] - 1, 1 << 40)),
        pytest.raises(ConfigError, match="not enough GPU memory: "),
    ):
        memory.fit(tiny, GPU, of_gpu)


def fit_in_rank(output: Path, photos: Path) -> tuple[int, str]:
    """The result of auto, and the error for 1, if rank 1 lacks a single byte."""
    auto, one = (configure(output, photos, "trainer.global_batch=32", w) for w in (AUTO, "trainer.accumulate=1"))
    with mock.patch("torch.cuda.mem_get_info", return_value=(total(one, world=2) - distributed.rank(), 1 << 40)):
        parts = memory.fit(auto, GPU, loader(auto, world=2)).trainer.accumulate
        with pytest.raises(ConfigError) as refusal:
            memory.fit(one, GPU, loader(one, world=2))
    # Both ranks have communicated the same number of times.
    assert distributed.gather_objects(distributed.rank()) == [0, 1]
    return parts, str(refusal.value)


def test_processes_agree_by_the_smallest_memory(tmp_path: Path, photos: Path) -> None:
    (of_first, first), (of_second, second) = in_ranks(2, fit_in_rank, tmp_path, photos)
    assert of_first == of_second == 2
    assert first == second
    assert "but the GPU of rank 1 has" in first


def test_nothing_is_written_before_a_refusal(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(memory, "free", return_value=1), pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", str(preset(tiny))])
    assert re.search(rf"^mcl pretrain: error: not enough GPU memory: {NUMBERS}.*\n$", capsys.readouterr().err)
    assert not tiny.run_folder.exists()


def preset(cfg: Config) -> Path:
    path = Path(cfg.output) / "preset.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(cfg)))
    return path


def test_auto_becomes_a_number_that_stays(tiny: Config) -> None:
    """In config.yaml and in checkpoints; it also stays if the run is resumed with more memory. A finished run needs no
    memory."""
    tiny = config.override(tiny, ["trainer.epochs=1", "trainer.checkpoint_epochs=0.5"])
    auto = config.override(tiny, [AUTO])
    with mock.patch.object(memory, "free", return_value=total(tiny) - 1):
        Trainer(auto).fit()
    written = config.from_dict(yaml.safe_load((tiny.run_folder / "config.yaml").read_text()))
    saved = config.from_dict(checkpoint.load(tiny.run_folder / "checkpoints" / "last.pt")["config"])
    assert written.trainer.accumulate == saved.trainer.accumulate == 2
    with mock.patch.object(memory, "free", return_value=1):
        assert Trainer(auto).finished
        checkpoint.steps(tiny.run_folder / "checkpoints")[-1].unlink()
        with pytest.raises(ConfigError, match="not enough GPU memory: a step of 16 images per GPU needs"):
            Trainer(auto)
    with mock.patch.object(memory, "free", return_value=1 << 40):
        resumed = Trainer(auto)
        assert (resumed.step, resumed.config.trainer.accumulate) == (2, 2)
        with pytest.raises(ConfigError, match=r"trainer\.accumulate: was 2 .* is now 1"):
            Trainer(tiny)


def test_an_out_of_memory_error_names_remedies(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with the exit code for wrong input; the traceback is in train.log."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB")
    with mock.patch.object(Trainer, "train_step", side_effect=error), pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", str(preset(tiny))])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"mcl pretrain: error: not enough memory: a step of 16 images did not fit into the memory of rank 0 \(peak "
        r"[\d.]+ GB; mcl budget counts [\d.]+ GB\); "
        rf"set trainer\.recompute=true \(needs [\d.]+ GB, same results\) or trainer\.accumulate=2 {OTHER_RUN}",
        line,
    )
    log = (tiny.run_folder / "train.log").read_text()
    assert "the run ends: OutOfMemoryError" in log
    assert str(error) in log


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["driver", "cuBLAS", "cuDNN", "CPU", "Python"],
)
def test_errors_for_lack_of_memory_are_explained(tiny: Config, error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"set trainer\.recompute=true") as raised,
        memory.explained(tiny, torch.device("cpu"), loader(tiny)),
    ):
        raise error
    assert raised.value.__cause__ is error


def test_other_errors_stay_what_they_are(tiny: Config) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with (
        pytest.raises(RuntimeError, match="illegal memory access") as raised,
        memory.explained(tiny, GPU, loader(tiny)),
    ):
        raise error
    assert raised.value is error


def test_on_a_gpu_the_error_has_its_numbers_and_its_limit(tiny: Config) -> None:
    """The numbers are PyTorch's, and remedies fit into the memory."""
    state: dict[str, Any] = {"max_memory_allocated": 71_230_000_000, "max_memory_reserved": 79_990_000_000}
    with (
        mock.patch.multiple(torch.cuda, **{name: lambda _, n=n: n for name, n in state.items()}),
        mock.patch("torch.cuda.mem_get_info", return_value=(total(tiny, "trainer.accumulate=2"), 1 << 40)),
        pytest.raises(OutOfMemoryError, match=r"\(peak 71\.2 GB, PyTorch's cache 80\.0 GB; ") as raised,
        memory.explained(tiny, GPU, loader(tiny)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert re.search(rf"; set trainer\.accumulate=2 {OTHER_RUN}$", str(raised.value))


def test_records_have_the_peak_of_memory(tiny: Config) -> None:
    """On a CPU this is Linux' figure for the process, which never decreases."""
    Trainer(config.override(tiny, ["trainer.epochs=1", "trainer.log_every=1"])).fit()
    peaks = [r["peak_memory_gb"] for r in read(tiny.run_folder / "metrics.jsonl")]
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / 1e9
    assert len(peaks) == 4
    assert peaks == sorted(peaks)
    assert 0.2 * resident < peaks[0] < 10 * resident
    assert f"{peaks[-1]:5.1f} GB  eta" in (tiny.run_folder / "train.log").read_text()
