"""Builds and runs programs in which CUDA kernels run on the CPU (``tests/kernels/emulation/cuda_emulation.h``)."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
EMULATION = Path(__file__).parent / "emulation"

SANITIZERS: dict[str, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
"""Flags of :func:`build`. A program can have only one of the two."""


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} not found: the tests of kernels need GCC 11 or later (apt install g++)")
    return found


def build(source: Path, out: Path, *flags: str) -> Path:
    """Compiles one file into the program `out`, with line numbers in stack traces; `flags` come last."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("PyTorch is not installed")
    include = [EMULATION, KERNELS, KERNELS / "csrc", Path(torch.origin).parent / "include"]
    # Sanitizers need only -g1, which compiles faster.
    command = [_tool("g++"), "-std=c++20", "-O1", "-g1", *(f"-I{folder}" for folder in include), *flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run([*command, "-o", str(out), str(source.resolve())], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{source} does not compile:\n{result.stderr}")
    return out


def run(program: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a program of :func:`build`; raises ``TimeoutExpired`` if it hangs, for instance at a barrier that some
    threads do not reach."""
    environment = dict(os.environ)
    # One report is enough: a race in 256 threads would produce reports for minutes.
    environment["TSAN_OPTIONS"] = f"halt_on_error=1:{environment.get('TSAN_OPTIONS', '')}"

    def start(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, str(program.resolve()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)

    def misplaced(result: subprocess.CompletedProcess[str]) -> bool:
        # ThreadSanitizer of GCC 13 and earlier supports at most 28 random bits of addresses
        return result.returncode != 0 and "unexpected memory mapping" in result.stderr

    result = start()
    if misplaced(result):
        result = start(_tool("setarch"), "-R")
        if misplaced(result) or "failed to set personality" in result.stderr:
            raise RuntimeError(
                "ThreadSanitizer does not run under this kernel's address randomisation, which may not be switched off "
                f"here: sudo sysctl vm.mmap_rnd_bits=28\n{result.stderr}"
            )
    return result


def uncovered_lines(source: Path, include: Path, workdir: Path) -> list[str]:
    """Builds and runs `source`; returns the executable lines of the file or folder `include` that never ran:
    "name:line: text".

    A line of a template has run if it ran in one instance. Templates without instances have no executable lines.
    """
    # Counts of lines are derived from those of neighbours, so updates by threads must be atomic.
    flags = ("-O0", "--coverage", "-fprofile-update=atomic")
    program = build(source, workdir / "coverage" / "program", *flags)
    for old in program.parent.glob("*.gcda"):
        old.unlink()
    result = run(program)
    if result.returncode != 0:
        raise RuntimeError(f"{source} fails with status {result.returncode}:\n{result.stdout}{result.stderr}")
    (counts,) = (path.resolve() for path in program.parent.glob("*.gcda"))
    command = [_tool("gcov"), "--json-format", "--stdout", counts.name]
    report = subprocess.run(command, cwd=counts.parent, capture_output=True, text=True, check=True).stdout
    ran: dict[tuple[Path, int], bool] = {}
    for file in json.loads(report)["files"]:
        path = Path(file["file"]).resolve()
        if not path.is_relative_to(include.resolve()):
            continue
        for line in file["lines"]:
            key = path, line["line_number"]
            ran[key] = ran.get(key, False) or line["count"] > 0
    if not ran:
        raise RuntimeError(f"{source} has no executable line of {include}")
    texts = {path: path.read_text().splitlines() for path, _ in ran}
    return [f"{path.name}:{line}: {texts[path][line - 1].strip()}" for path, line in sorted(ran) if not ran[path, line]]
