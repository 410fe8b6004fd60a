"""Builds, tests and measures on a machine with a GPU: ``make gpu``, or ``python -m benchmarks.gpu``.

It compiles the operators, runs the tests that need a GPU, measures, and reports what limits a run. Every stage is a
process with a time limit. When a stage ends, its log and JSON file are in the folder, and ``report.md`` and
``report.json`` are updated. A stage is skipped if it may take longer than the remaining time, or if it needs a package
that is not installed; the report names the reason.

This module imports only Python's standard library, since it runs before anything is installed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "data" / "photos" / "train"
PRESET = ROOT / "mcl" / "presets" / "mcl_r50_fpn_100e_in1k.yaml"
MINUTES = 8.0
"""Time limit of all stages after the installation together, without ``--full``."""
OPTIONAL = {
    "nvidia.dali": "Pillow and torchvision load images",
    "mmdet": "no detector is tested",
}
"""Optional packages, and the consequence if one is not installed."""
IDLE = 0.1
"""Idle share of a step's GPU time from which the report mentions it."""

_PROBE = """
import importlib.util, json, sys, torch
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
try:
    from mcl.ops import compiled
    built = compiled("region_pool", "cuda")
except ImportError:
    built = False
missing = [name for name in sys.argv[1:] if not there(name)]
cuda, version = torch.cuda.is_available(), str(torch.__version__)
print(json.dumps({"cuda": cuda, "torch": version, "missing": missing, "built": built}))
"""

Outcome = dict[str, Any]
"""``status`` (done, failed or skipped), ``seconds`` unless skipped, and ``why`` unless done."""


@dataclass(frozen=True)
class Gpu:
    """Name and compute capability of the first GPU, and the number of GPUs of the machine."""

    name: str
    capability: str
    count: int = 1


@dataclass(frozen=True)
class Stage:
    """A stage, which runs in a process of its own."""

    name: str
    seconds: float
    """Time limit of the process."""
    arguments: Sequence[str]
    """Arguments of Python."""
    full: bool = False
    """Whether the stage runs only with ``--full``."""
    needs: str = ""
    """A package that the stage requires."""


def find_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi lists; None if there is none, or none is visible."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    if "," not in said or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    each = said.strip().splitlines()
    name, capability = each[0].rsplit(",", 1)
    return Gpu(name.strip(), capability.strip(), len(each))


def stages(folder: Path, full: bool, images: int, threads: int) -> list[Stage]:
    """All stages, in order.

    Args:
        folder: folder of JSON files.
        full: whether to include the stages of ``--full``.
        images: images per step.
        threads: threads of the loader.
    """

    def measure(name: str, seconds: float, *words: object, full: bool = False, needs: str = "") -> Stage:
        module, *rest = map(str, words)
        arguments = ["-m", f"benchmarks.{module}", *rest, "--json", str(folder / f"{name}.json")]
        return Stage(name, seconds, arguments, full, needs)

    keys = {"data.root": PHOTOS, "data.threads": threads, "trainer.global_batch": images, "log.preview": "false"}
    preset = [PRESET, *(f"{key}={value}" for key, value in keys.items())]
    turns = ["--seconds", 2, "--steps", 30, "--repeat", 3]
    step = ["step", "--images", images, "--repeat", 3, "--precision"]
    ways = ["supervised_canvas", "authors", "released", "matched", "recompute", "graph", "compile"]
    tests = [
        "-m",
        "pytest",
        "tests/gpu",
        "-m",
        "gpu" if full else "gpu and not soak",
        "--junit-xml",
        str(folder / "tests.xml"),
    ]
    every = [
        Stage("tests", 1200 if full else 150, tests),
        measure("end_to_end", 75, "end_to_end", *preset, *turns),
        measure("profile", 45, "profile", *preset),
        measure("step", 90, *step, "bf16", "--contenders", "supervised", "matched", "graph"),
        measure("kernels", 60, "kernels", "--images", images, "--repeat", 3),
    ]
    for name, words in {"fp32": ["fp32", "--no-tf32"], "tf32": ["fp32"], "bf16": ["bf16"], "fp16": ["fp16"]}.items():
        words = [*step, *words, "--contenders", "supervised", *ways, "budget", "budget_2x"]
        every.append(measure(f"step_{name}", 900, *words, full=True))
    every.append(measure("loader", 900, "loader", "--data", PHOTOS, "--batch", images, full=True))
    for device in ("cpu", "gpu"):
        words = ["end_to_end", *preset, f"data.device={device}", *turns]
        every.append(measure(f"end_to_end_{device}", 180, *words, full=True, needs="nvidia.dali"))
    graph = [*preset, "trainer.cuda_graph=true"]
    every.append(measure("end_to_end_graph", 180, "end_to_end", *graph, *turns, full=True))
    every.append(measure("profile_graph", 90, "profile", *graph, full=True))
    return [stage for stage in every if full or not stage.full]


def run(
    name: str, command: Sequence[str], seconds: float | None, folder: Path, environment: Mapping[str, str]
) -> Outcome:
    """Runs a command, whose output goes to a log; after `seconds` it is killed, with all processes of its session."""
    start, log = time.monotonic(), folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also after Ctrl-C, which the new session does not receive
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome: Outcome = {"status": "failed" if status != 0 else "done", "seconds": round(time.monotonic() - start, 1)}
    if status is None:
        outcome["why"] = f"not finished after {seconds:.0f} s"
    elif status:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        outcome["why"] = said[-1][:300] if said else f"exit status {status}"
    return outcome


def attempt(stage: Stage, left: float, missing: Sequence[str], work: Callable[[Stage], Outcome]) -> Outcome:
    """Runs a stage if its package is installed and there is enough time.

    Args:
        stage: the stage.
        left: seconds left for all stages.
        missing: packages that are not installed.
        work: runs the stage.
    """
    if stage.needs in missing:
        return {"status": "skipped", "why": f"{stage.needs} is not installed"}
    if stage.seconds > left:
        why = f"it may take {stage.seconds:.0f} s, but {max(0, left):.0f} s are left; FULL=1 has no limit"
        return {"status": "skipped", "why": why}
    return work(stage)


def build(python: str, gpu: Gpu, found: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Compiles the operators in place, with this Python and only for this GPU; without DALI, without its plugin."""
    if found["built"]:
        return {"status": "skipped", "why": "the operators are already compiled for CUDA; make clean removes them"}
    own = {"TORCH_CUDA_ARCH_LIST": gpu.capability, "MCL_BUILD_PLUGIN": str(int("nvidia.dali" not in found["missing"]))}
    outcome = run("build", [python, "setup.py", "build_ext", "--inplace"], None, folder, own | dict(environment))
    said = re.findall(r"^mcl: (.*built for CPUs only.*)$", (folder / "build.log").read_text(), re.MULTILINE)
    return {**outcome, "why": said[0]} if said else outcome


def summarize_tests(folder: Path) -> None:
    """Writes tests.json from pytest's report: number of passed tests, failed tests, and reasons of skipped tests."""
    report = folder / "tests.xml"
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [
        f"{c.get('classname')}.{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = [(s.get("message") or "").strip() for c in cases for s in c.iter("skipped")]
    summary = {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": {why: skipped.count(why) for why in sorted(set(skipped))},
    }
    (folder / "tests.json").write_text(json.dumps(summary, indent=1) + "\n")


def bounds(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences that say what limits the speed of a run.

    Args:
        measured: by finished stage, its results by name.
    """
    lines = []
    if end := measured.get("end_to_end"):
        together = end["together"]
        rates = ", ".join(f"{name} {end[name]['images_per_s']:,.0f}" for name in ("loader", "model", "together"))
        lines.append(
            f"Images per second: {rates}. The {together['bound_by']} limits the speed; the run reaches "
            f"{together['of_slower']:.0%} of the {together['bound_by']}'s rate alone."
        )
        if together["bound_by"] == "loader":
            lines.append("Raise data.threads, or change data.engine or data.device: mcl doctor --measure times them.")
    if profile := measured.get("profile"):
        step = profile["step"]
        first, second, *_ = [*step["kinds"].items(), ("nothing else", 0.0), ("nothing else", 0.0)]
        lines.append(
            f"The GPU idles for {step['idle']:.0%} of a step. Of its work {first[1]:.0%} is {first[0]}, "
            f"{second[1]:.0%} {second[0]}."
        )
        if step["idle"] > IDLE:
            lines.append(
                "It waits for images or for the host to queue work; trainer.cuda_graph=true queues a step at once."
            )
    if steps := measured.get("step"):
        ways = {r["contender"]: r for r in steps.values()}
        if "graph" in ways and "matched" in ways:
            gain = ways["matched"]["seconds"] / ways["graph"]["seconds"]
            lines.append(f"On fixed inputs a CUDA graph makes a step {gain:.2f} times as fast.")
    return lines


def report(folder: Path, gpu: Gpu, torch: str, missing: Sequence[str], outcomes: Mapping[str, Outcome]) -> str:
    """Writes report.json and report.md; returns the latter."""
    done = [name for name, outcome in outcomes.items() if outcome["status"] == "done"]
    files = {name: folder / f"{name}.json" for name in (*done, "tests")}
    read = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    measured = {name: {r["name"]: r for r in each["results"]} for name, each in read.items() if "results" in each}
    words = [*bounds(measured), *(f"{name} is not installed: {OPTIONAL[name]}." for name in missing)]
    if tests := read.get("tests"):
        skipped = "; ".join(f"{why} ({count})" for why, count in tests["skipped"].items())
        words.append(f"Tests: {tests['passed']} passed, {len(tests['failed'])} failed; skipped: {skipped or 'none'}.")
    whole = {"gpu": gpu.name, "torch": torch, "words": words, "stages": outcomes}
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    lines = [f"# {gpu.name}, torch {torch}", "", *words, "", "| stage | seconds | outcome |", "|---|---|---|"]
    for name, outcome in outcomes.items():
        why = f": {outcome['why']}" if "why" in outcome else ""
        lines.append(f"| {name} | {outcome.get('seconds', 0):.0f} | {outcome['status']}{why} |")
    for name in done:
        said = (folder / f"{name}.log").read_text(errors="replace").splitlines()
        if rows := [line for line in said if line.startswith("|")]:
            lines += ["", f"## {name}", "", *rows]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/gpu-DEVICE")
    parser.add_argument("--full", action="store_true", help="run everything, without a time limit")
    parser.add_argument(
        "--venv", choices=["yes", "no"], default="yes", help="no: use this Python and its torch without changes"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels of missing packages; needs no network")
    parser.add_argument("--images", type=int, default=128, help="images per step")
    options = parser.parse_args(arguments)
    gpu = find_gpu()
    if gpu is None:
        print("make gpu: no GPU: nvidia-smi finds none, or CUDA_VISIBLE_DEVICES hides it", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower().removeprefix("nvidia "))
    folder = (options.out or ROOT / "benchmarks" / "results" / f"gpu-{name}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as packages:
        return measure(options, gpu, folder, packages)


def measure(options: argparse.Namespace, gpu: Gpu, folder: Path, packages: str) -> int:
    """Runs all stages and returns the exit status; `packages` is a folder for wheels."""
    paths = [packages, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    outcomes: dict[str, Outcome] = {}
    python = sys.executable

    def note(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        print(
            f"{name}: {outcome['status']}{': ' * ('why' in outcome)}{outcome.get('why', '')}",
            file=sys.stderr,
            flush=True,
        )

    if options.wheels:
        names = sorted({wheel.name.partition("-")[0] for wheel in options.wheels.glob("*.whl")})
        pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", str(options.wheels.resolve())]
        note("wheels", run("wheels", [*pip, "--target", packages, *names], None, folder, environment))
    if options.venv == "yes":
        python = str(ROOT / ".venv" / "bin" / "python")
        own = {**environment, "TORCH_CUDA_ARCH_LIST": gpu.capability}
        note("build", run("build", ["make", "setup"], None, folder, own))
        if not Path(python).exists():
            said = [line for line in (folder / "build.log").read_text().splitlines() if not line.startswith("make")]
            print(
                f"make gpu: make setup failed: {(said or ['no output'])[-1]} ({folder / 'build.log'})", file=sys.stderr
            )
            return 2
    deadline = time.monotonic() + (float("inf") if options.full else 60 * MINUTES)
    probed = subprocess.run(
        [python, "-c", _PROBE, *OPTIONAL], env=environment, capture_output=True, text=True, check=False
    )
    if probed.returncode or not (found := json.loads(probed.stdout))["cuda"]:
        why = (probed.stderr.strip().splitlines() or ["its torch sees no CUDA device; run mcl doctor"])[-1]
        print(f"make gpu: {gpu.name} cannot be used by {python}: {why}", file=sys.stderr)
        return 2
    if options.venv == "no":
        note("build", build(python, gpu, found, folder, environment))
    text = ""
    threads = max(1, len(os.sched_getaffinity(0)) // gpu.count)  # as one process of a run on all GPUs
    for stage in stages(folder, options.full, options.images, threads):
        print(f"{stage.name}: at most {stage.seconds:.0f} s", file=sys.stderr, flush=True)
        note(
            stage.name,
            attempt(
                stage,
                deadline - time.monotonic(),
                found["missing"],
                lambda it: run(it.name, [python, *it.arguments], it.seconds, folder, environment),
            ),
        )
        if stage.name == "tests":
            summarize_tests(folder)
        text = report(folder, gpu, found["torch"], found["missing"], outcomes)
    print(text, end="")
    return int(any(outcome["status"] == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
