"""CUDA kernels, emulated on the CPU, equal the CPU kernels, pass sanitizers, and execute every line; CPU kernels alone;
and the compiled library."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcl.ops.library import compiled
from tests.conftest import ROOT
from tests.kernels import programs, ptxas
from tests.kernels.programs import EMULATION

CUDA = ROOT / "kernels" / "csrc" / "cuda"
PROGRAMS = ["batch_norm", "region_pool", "steps"]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_agree_with_the_cpu_and_sanitizers_find_nothing(program: str, sanitizer: str, tmp_path: Path) -> None:
    # The level that compiles faster.
    flags = [*programs.SANITIZERS[sanitizer], "-O0" if sanitizer == "address" else "-O1"]
    binary = programs.build(EMULATION / f"{program}.cpp", tmp_path / program, *flags)
    result = programs.run(binary)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "ok", "")


@pytest.mark.soak
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_line_of_the_kernels_is_executed(program: str, tmp_path: Path) -> None:
    assert programs.uncovered_lines(EMULATION / f"{program}.cpp", CUDA, tmp_path) == []


@pytest.mark.parametrize(
    ("program", "file", "right", "wrong", "sanitizer", "report"),
    [
        ("steps", "lars.cuh", "  __syncthreads();\n", "", "thread", "data race"),
        (
            "steps",
            "tensor_table.cuh",
            ": table.size[low];",
            ": table.size[low] + 1;",
            "address",
            "heap-buffer-overflow",
        ),
        (
            "steps",
            "tensor_table.cuh",
            "*found_inf != 0;",
            "*found_inf > 1;",
            None,
            "weights of a skipped step: element 0",
        ),
        ("steps", "lars.cuh", "distance > 0; distance /= 2", "distance > 1; distance /= 2", None, "norm: element 0 is"),
        ("batch_norm", "batch_norm.cuh", "  __syncthreads();  // all values are written\n", "", "thread", "data race"),
        ("batch_norm", "batch_norm.cuh", "  __syncthreads();  // all sums are written\n", "", "thread", "data race"),
        (
            "batch_norm",
            "batch_norm.cuh",
            "min(rows, part * step)",
            "min(rows + 1, part * step)",
            None,
            "statistics: element",
        ),
        ("batch_norm", "batch_norm.cuh", "own[rows.channels + v]", "own[v]", None, "output: element"),
    ],
    ids=["barrier", "bounds", "flag", "sum", "barrier of slots", "barrier of parts", "group", "statistics"],
)
def test_faults_planted_in_the_kernels_are_found(
    program: str, file: str, right: str, wrong: str, sanitizer: str | None, report: str, tmp_path: Path
) -> None:
    """Runs the same program with one line of a kernel changed."""
    sources = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    faulty = sources / "csrc" / "cuda" / file
    text = faulty.read_text()
    assert text.count(right) == 1
    faulty.write_text(text.replace(right, wrong))
    flags = programs.SANITIZERS[sanitizer] if sanitizer else []
    built = programs.build(EMULATION / f"{program}.cpp", tmp_path / "faulty", f"-iquote{sources / 'csrc'}", *flags)
    result = programs.run(built)
    assert result.returncode != 0
    assert report in result.stdout + result.stderr


LIBRARIES = sorted([*(ROOT / "mcl").glob("_C*.so"), *(ROOT / "dali_pipelines").glob("*.so")])


def test_no_kernel_spills_registers() -> None:
    if not compiled("region_pool", "cuda"):
        pytest.skip("the extension was built without CUDA")
    kernels = ptxas.parse(ptxas.REPORT.read_text())
    names = " ".join(k.name for k in kernels)
    for name in (
        "region_pool_forward",
        "region_pool_backward",
        "batch_norm_apply",
        "batch_norm_gradient",
        "lars_update",
        "ema_update",
    ):
        assert name in names
    assert {"sm_80", "sm_90"} <= {k.architecture for k in kernels}
    assert [k for k in kernels if k.spill_stores or k.spill_loads or k.stack] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm comes with a compiler")
@pytest.mark.parametrize(
    "library", [path for path in LIBRARIES if path.parent.name == "mcl"], ids=lambda path: path.name
)
def test_only_the_stable_interface_of_torch_is_used(library: Path) -> None:
    symbols = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r"^ +U (.*)$", symbols, re.MULTILINE)
    assert any(s.startswith("aoti_torch_") for s in undefined)
    assert [s for s in undefined if re.search(r"\b(at|c10|torch::jit)::", s)] == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf comes with a compiler")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_what_a_library_needs_is_what_loads_it(library: Path) -> None:
    """Libraries have no paths of the machine that compiled them, and need CUDA only beside a PyTorch with CUDA."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    assert not [name for name in needed if "/" in name]
    assert [name for name in needed if "cuda" in name] == (
        ["libcudart.so.13", "libtorch_cuda.so"] if "cuda" in library.name else []
    )


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """Reads what setup.py would build, without building."""
    command = [sys.executable, "setup.py", "--quiet", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_build_fails_loudly_or_is_told_not_to_try(tmp_path: Path) -> None:
    no_compiler = setup(PATH=str(tmp_path))
    assert no_compiler.returncode != 0
    assert "MCL_BUILD_EXTENSION=0" in no_compiler.stderr
    told = setup(PATH=str(tmp_path), MCL_BUILD_EXTENSION="0")
    assert (told.returncode, told.stdout.split()[-1]) == (0, "mcl-pretrain")
    typo = setup(PATH="/usr/bin:/bin", MCL_BUILD_CUDA="yes")
    assert "MCL_BUILD_CUDA=yes: must be 0 or 1" in typo.stderr


WITHOUT_EXTENSION = """
import pathlib
import torch
exists, glob = pathlib.Path.exists, pathlib.Path.glob
pathlib.Path.exists = lambda self: not self.name.startswith("_C") and exists(self)
pathlib.Path.glob = lambda self, pattern: iter(()) if pattern.startswith("_C") else glob(self, pattern)
from mcl import ops
from mcl.train.optim import LARS
assert ops.missing["cpu"] and ops.missing["cuda"] and not ops.compiled("region_pool", "cpu")
features = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
boxes = torch.tensor([[0, 0, 0, 16, 16.], [0, 16, 0, 32, 16.]])
def pool(features):
    return ops.region_pool([features], [8.0], boxes, torch.zeros(2, dtype=torch.int64), 2)
pooled = pool(features)
assert torch.equal(pooled[1], features[0, :, :2, 2:])
assert torch.autograd.gradcheck(pool, features) and torch.autograd.gradgradcheck(pool, features)
again = torch.compile(pool, fullgraph=True, backend="aot_eager")(features)
assert torch.equal(again, pooled)
assert torch.equal(*(torch.autograd.grad(p.square().sum(), features)[0] for p in (again, pooled)))
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
LARS([weight], lr=1.0).step()
assert bool((weight < 1).all())
print(ops.describe("cpu"))
print(ops.costs("cpu"))
"""


def test_without_the_extension_pytorch_and_torchvision_do_everything() -> None:
    command = [sys.executable, "-c", WITHOUT_EXTENSION]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "torchvision: region_pool; PyTorch: batch_norm, norms, lars_, ema_, clip, cross_entropy",
        "steps are slower without mcl's CPU operators (region_pool: a launch per map, and on GPUs gradients that are "
        "added in no fixed order; batch_norm: more launches, and more passes over every map; lars_: more passes over "
        "the parameters; ema_: more passes over the parameters): the extension is not installed; "
        "pip install --no-build-isolation -e . installs it",
    ]
