"""On a machine with a GPU, only tests that need the GPU see it, and ``make test`` runs both kinds."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, pytest_configure


@pytest.mark.parametrize(
    ("expression", "seen"),
    [
        *(("not soak and not gpu", False), ("soak or fault", False), ("", False)),
        *(("gpu", True), ("gpu and not soak", True)),
    ],
)
def test_a_gpu_is_hidden_unless_it_is_asked_for(expression: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))  # type: ignore[arg-type]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if seen else "")


def test_the_gpu_is_hidden_in_this_process(pytestconfig: pytest.Config) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" or "gpu" in pytestconfig.option.markexpr


@pytest.mark.parametrize("there", [True, False])
def test_make_test_runs_the_tests_that_need_one_where_there_is_one(there: bool, tmp_path: Path) -> None:
    calls, done = tmp_path / "calls", tmp_path / "done"
    done.touch()
    for name, line in {"pytest": f"printf '%s\\n' \"$*\" >> {calls}", "nvidia-smi": f"exit {int(not there)}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    words = [f"BIN={tmp_path}", f"INSTALLED={done}", f"MMDET={done}", "-o", str(done)]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["make", "test", *words], cwd=ROOT, env=environment, capture_output=True, check=True)
    plain, *gpu = calls.read_text().splitlines()
    assert "-m" not in plain.split()
    assert gpu == ["-m gpu and not soak tests/gpu"] * there
