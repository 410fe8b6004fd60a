"""Imports have one direction: kernels <- dali_pipelines <- mcl <- benchmarks and tests; and the command line starts
quickly."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ABOVE = {
    "dali_pipelines": {"mcl", "benchmarks", "tests"},
    "mcl": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}
"""Packages that a package must not import."""


def imported(file: Path) -> set[str]:
    """Top-level packages that a module imports, at any place."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ABOVE)
def test_no_module_imports_what_builds_on_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): found for file in files if (found := imported(file) & ABOVE[package])}
    assert not wrong


MAIN = """
import contextlib
from mcl import cli
with contextlib.suppress(SystemExit):
    cli.main(["{}"])
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import dali_pipelines.loader, dali_pipelines.pipelines, dali_pipelines.reference", "mcl"),
        ("import dali_pipelines.geometry, dali_pipelines.plan, dali_pipelines.settings", "torch"),
        (MAIN.format("--help"), "torch"),
        (MAIN.format("--version"), "torch"),
    ],
)
def test_imports_that_are_avoided(code: str, absent: str) -> None:
    code += f"\nimport sys\nassert {absent!r} not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
