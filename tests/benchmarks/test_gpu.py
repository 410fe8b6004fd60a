"""``make gpu`` with a simulated GPU: stages, time limits and report."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, profile
from benchmarks.common import ROOT
from benchmarks.gpu import Gpu, Stage
from mcl import config

SAYS_H200 = "#!/bin/sh\necho 'NVIDIA H200, 9.0'\n"
PYTHON = """#!{executable}
import json, pathlib, shutil, sys
calls = pathlib.Path({calls!r})
calls.write_text(calls.read_text() + json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
if words[0] == "-c":
    print(json.dumps({probe!r}))
elif "--junit-xml" in words:
    pathlib.Path(words[words.index("--junit-xml") + 1]).write_text({xml!r})
elif "benchmarks.kernels" in words:
    sys.exit("kernels: a relative error of 9")
elif "--json" in words:
    print("| what |")
    shutil.copy({results!r} + "/" + words[1].removeprefix("benchmarks.") + ".json", words[words.index("--json") + 1])
"""
XML = """<testsuites><testsuite><testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>
<testcase classname="a" name="z"><skipped message="no CUDA device"/></testcase></testsuite></testsuites>"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """A machine with a GPU, whose Python copies the results of earlier benchmarks; returns the calls of that Python."""
    script(tmp_path / "nvidia-smi", SAYS_H200)
    results, calls = tmp_path / "results", tmp_path / "calls"
    results.mkdir()
    for name, source in {"end_to_end": "end_to_end", "step": "step_r50", "loader": "loader"}.items():
        (results / f"{name}.json").write_text((ROOT / "benchmarks" / "results" / f"{source}.json").read_text())
    kernels = [("conv_fprop", 600.0, 5), ("mcl::batch_norm_apply", 200.0, 10)]
    measured = profile.evaluate(kernels, [(0, 800)], seconds=1e-3, steps=1, images=32)
    (results / "profile.json").write_text(json.dumps({"results": measured}))

    def run(*arguments: str, **probe: Any) -> list[list[str]]:
        calls.write_text("")
        answer = {"cuda": True, "torch": "2.14.1", "missing": [], "built": False, **probe}
        text = PYTHON.format(executable=sys.executable, calls=str(calls), probe=answer, xml=XML, results=str(results))
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            patch.setattr(sys, "executable", str(script(tmp_path / "python", text)))
            # The stage kernels fails.
            assert gpu.main(["--venv", "no", "--out", str(tmp_path / "out"), *arguments]) == 1
        return [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def test_everything_is_run_and_reported(
    machine: Callable[..., list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pydantic-2.14.3-py3-none-any.whl", "pydantic_core-2.4-cp312.whl", "pydantic_core-2.4-cp311.whl"):
        (wheels / name).touch()
    calls = machine("--wheels", str(wheels), missing=["nvidia.dali"])
    assert calls[0][:4] == ["-m", "pip", "install", "--no-index"]
    assert calls[0][-2:] == ["pydantic", "pydantic_core"]
    assert calls[2] == ["setup.py", "build_ext", "--inplace"]
    assert [call[1].removeprefix("benchmarks.") for call in calls[3:]] == [
        *("pytest", "end_to_end", "profile", "step", "kernels")
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: outcome["status"] for name, outcome in report["stages"].items()} == {
        **dict.fromkeys(("wheels", "build", "tests", "end_to_end", "profile", "step"), "done"),
        "kernels": "failed",
    }
    assert report["stages"]["kernels"]["why"] == "kernels: a relative error of 9"
    assert json.loads((tmp_path / "out" / "tests.json").read_text()) == {
        **{"passed": 1, "failed": ["a.y"], "skipped": {"no CUDA device": 1}}
    }
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "report.md").read_text()
    for words in (
        *(
            "# NVIDIA H200, torch 2.14.1",
            "The model limits the speed",
            "The GPU idles for 20% of a step. Of its work 75% is",
        ),
        *(
            "nvidia.dali is not installed: Pillow",
            "1 passed, 1 failed; skipped: no CUDA device (1)",
            "## step\n\n| what |",
        ),
        "| kernels | 0 | failed: kernels: a relative error of 9 |",
    ):
        assert words in printed


def test_full_skips_what_needs_a_package_that_is_not_there(
    machine: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    calls = machine("--full", missing=["nvidia.dali"], built=True)
    assert "setup.py" not in {call[0] for call in calls}
    outcomes = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    skipped = {name: outcome["why"] for name, outcome in outcomes.items() if outcome["status"] == "skipped"}
    assert skipped.pop("build").startswith("the operators are already compiled for CUDA")
    assert skipped == dict.fromkeys(("end_to_end_cpu", "end_to_end_gpu"), "nvidia.dali is not installed")
    assert {f"step_{precision}" for precision in ("fp32", "tf32", "bf16", "fp16")} | {
        "loader",
        "profile_graph",
    } < outcomes.keys()


@pytest.mark.parametrize("full", [False, True])
def test_options_are_those_of_the_benchmarks(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and configuration keys of all stages exist."""

    class Parsed(Exception):
        pass

    def stopping(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def stop(*arguments: Any) -> None:
            raise Parsed(parse(*arguments))

        return stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    for stage in gpu.stages(tmp_path, full, images=128, threads=2):
        _, module, *words = stage.arguments
        if module == "pytest":
            continue
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main(words)
        options = parsed.value.args[0]
        assert options.json == tmp_path / f"{stage.name}.json"
        if "overrides" in options:
            config.load(options.config, options.overrides).images_per_rank(1)


def test_the_default_leaves_time_to_build(tmp_path: Path) -> None:
    stages = gpu.stages(tmp_path, full=False, images=128, threads=2)
    assert sum(stage.seconds for stage in stages) <= 60 * gpu.MINUTES - 60


def test_the_loader_has_the_cores_of_one_of_the_gpus(
    machine: Callable[..., list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    script(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'NVIDIA H200, 9.0'\necho 'NVIDIA H200, 9.0'\n")
    calls = machine(missing=[])
    assert [call[1] for call in calls if "data.threads=8" in call] == ["benchmarks.end_to_end", "benchmarks.profile"]


def test_stages_that_would_take_too_long_are_skipped() -> None:
    stage = Stage("loader", 100, [])
    assert gpu.attempt(stage, 100.0, [], lambda _: {"status": "done"}) == {"status": "done"}
    assert gpu.attempt(stage, 99.0, [], lambda _: {"status": "done"}) == {
        **{"status": "skipped", "why": "it may take 100 s, but 99 s are left; FULL=1 has no limit"}
    }


def test_a_stage_ends_after_its_time_with_all_that_it_started(tmp_path: Path) -> None:
    command = ["sh", "-c", f"(sleep 1; touch {tmp_path}/late) & echo begun; wait"]
    outcome = gpu.run("slow", command, 0.3, tmp_path, os.environ)
    assert (outcome["status"], outcome["why"]) == ("failed", "not finished after 0 s")
    assert 0.3 <= outcome["seconds"] < 1
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def test_a_slow_loader_and_an_idle_gpu_are_named() -> None:
    end = {name: {"images_per_s": rate} for name, rate in {"loader": 500.0, "model": 1500.0, "together": 490.0}.items()}
    end["together"] |= {"bound_by": "loader", "of_slower": 0.98}
    (step,) = profile.evaluate([], [], seconds=1.0, steps=1, images=32)
    ways = {name: {"contender": name, "seconds": s} for name, s in {"matched": 0.3, "graph": 0.2}.items()}
    words = " ".join(gpu.bounds({"end_to_end": end, "profile": {"step": step}, "step": ways}))
    assert "The loader limits the speed; the run reaches 98% of the loader's rate alone. Raise data.threads" in words
    assert "The GPU idles for 100% of a step" in words
    assert "trainer.cuda_graph=true queues a step at once" in words
    assert "a CUDA graph makes a step 1.50 times as fast" in words
    assert gpu.bounds({}) == []


@pytest.mark.parametrize(
    ("tool", "hidden"),
    [(None, None), ("#!/bin/sh\nexit 9\n", None), (SAYS_H200, "")],
    ids=["no tool", "no GPU", "hidden"],
)
def test_without_a_gpu_it_says_so_in_one_line(tool: str | None, hidden: str | None, tmp_path: Path) -> None:
    if tool:
        script(tmp_path / "nvidia-smi", tool)
    environment = {"PATH": str(tmp_path)} | ({} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden})
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "make gpu: no GPU: nvidia-smi finds none, or CUDA_VISIBLE_DEVICES hides it\n"


def test_a_torch_that_sees_no_gpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", "#!/bin/sh\necho '{\"cuda\": false}'\n")))
    assert gpu.main(["--venv", "no", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make gpu: NVIDIA H200 cannot be used by")
    assert line.endswith("its torch sees no CUDA device; run mcl doctor")
