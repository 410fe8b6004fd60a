"""The documentation site: the Python reference is complete, and a dead link fails the build."""

import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mcl
import mcl.objectives
from tests.conftest import ROOT


def test_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.M)
    public = {f"{module.__name__}.{name}" for module in (mcl, mcl.ops, mcl.objectives) for name in module.__all__}
    assert public - {"mcl.ops"} <= set(listed)
    assert all(pydoc.locate(name) is not None for name in listed)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[a](../docker/Dockerfile)", ""),
        ("[a](nowhere.md)", "'docs/nowhere.md'"),
        ("[a](../docker/nothing)", "'../docker/nothing'"),
        ("[a](../CHANGELOG.md#nothing)", "does not contain an anchor"),
        ("::: mcl.nothing", "mcl.nothing"),
    ],
)
def test_dead_link(link: str, said: str, tmp_path: Path) -> None:
    """Builds a site of the Markdown files and sources, and a page with one link or one object of the reference."""
    pytest.importorskip("mkdocs", reason="make docs installs MkDocs")
    for folder in ("docker", "mcl", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    settings = re.sub(r"^nav:\n(  .*\n)+", "", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    (tmp_path / "mkdocs.yml").write_text(settings)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{link}\n")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (built.returncode != 0) == bool(said), built.stderr
    assert said in built.stderr
