"""README and documents: links, widths, and every command.

`make soak` runs the commands, each page in a folder of its own with the repository's photographs and a run of the demo.
What is not run is listed here, with the reason or with what runs it.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mcl import cli
from mcl.config import DETECTORS, PRESETS, load
from tests.conftest import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "*/README.md", "tests/data/README.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = ("mcl", "make", "pip", "python", "pytest", "source", "mkdir", "bash", "hf", "sbatch", "torchrun", "docker")

NOT_RUN = {
    r"make [\w ]+": "installs, or takes minutes; continuous integration runs check, test and release, which need "
    "setup, mmdet, docs and wheels; demo's own command is run here",
    r"source .venv/bin/activate": "changes the shell",
    r"(.venv/bin/)?pip install .*": "downloads; scripts/check_wheels.sh installs the wheels, make bench the rest",
    r"(.venv/bin/)?python -m benchmarks\.transfer .*": "hours; tests/benchmarks runs it at a tiny size",
    r"python scripts/build_data.py .*": "needs the packages that make data downloads",
    r"python -m tests\.dali_pipelines\.\w+": "tests/dali_pipelines/test_engines.py measures the same",
    r"pytest -s -m soak .*": "make soak runs it",
    r"docker .*": "needs Docker",
    r"hf upload .*": "needs an account",
    r"mcl install-mmdet": "make mmdet runs it",
    r"mcl pretrain mcl_r50\S* .*": "needs GPUs, and mostly ImageNet; the keys are checked here",
    r"mcl budget mcl_r50_fpn_100e_in1k --gpus 256 .*": "tests/mcl/budget/test_communication.py counts the same",
    r"mcl finetune .*": "needs COCO, VOC or hours; tests/mcl/finetune/test_soak.py does a step of each detector",
    r"mcl detect .*": "needs a detector; tests/mcl/finetune/test_detection.py trains one and runs it",
    r"mcl convert voc .*": "needs VOC; tests/mcl/finetune/test_voc.py runs it",
    r"mcl evaluate (svm|regions) .*": "need annotations; tests/mcl/evaluation runs them",
}
"""Reasons, by a pattern of the whole command."""

INSTEAD = {
    "/data/imagenet": "data/photos",
    "/data/shards": "shards",
    "FOLDER": "data/photos/train",
    "pretrain mcl_r18_fpn_demo": "pretrain mcl_r18_fpn_demo trainer.epochs=3",
}
"""Replacements for the user's own data, and words that make runs short."""


def blocks(page: str) -> Iterator[list[str]]:
    """Lines of indented blocks and of shell blocks."""
    text = (ROOT / page).read_text()
    yield from (block.splitlines() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.findall(r"(?<=\n\n)((?: {4}.*\n)+)", text):
        yield [line[4:] for line in block.splitlines()]


def commands(page: str) -> list[str]:
    """Commands of a page, in order, without comments."""
    found = []
    for block in blocks(page):
        for line in re.sub(r"\\\n\s*", "", "\n".join(block)).splitlines():
            command = re.sub(r"\s+#.*", "", line).strip()
            if re.match(rf"(\.venv/bin/)?({'|'.join(PROGRAMS)}) ", command):
                found.append(command)
    return found


def not_run(command: str) -> list[str]:
    return [pattern for pattern in NOT_RUN if re.fullmatch(pattern, command)]


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as on GitHub."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_120_columns(page: str) -> None:
    """Except for tables, output of programs, markers of tables, and links. No line ends within code."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert [line for line in text.splitlines() if line.count("`") % 2] == []
    wide = [line for line in text.splitlines() if len(line) > 120]
    assert [line for line in wide if not re.match(r"\||    |<!-- |.*\]\(\S+\)\S*$", line)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets, commands, options, presets and keys exist."""
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        for part in re.split(r" && |; ", command):
            words = shlex.split(part)
            if words[0] == "make":
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert {word for word in words[1:] if "=" not in word} <= set(targets), part
            elif words[0] == "mcl":
                understood(words[1:], capsys)


def understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = words
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert stop.value.code == 0
    assert {word for word in rest if word.startswith("--")} <= options, words
    if verb == "finetune":
        assert (DETECTORS / f"{rest[0]}.py").exists(), rest[0]
    names = [word for word in rest if word.startswith("mcl_")]
    assert all((PRESETS / f"{name}.yaml").exists() for name in names), names
    if verb != "finetune":
        keys = [word for word in rest if re.match(r"[\w.]+=", word)]
        cli.main(["config", *(names or ["mcl_r18_fpn_demo"]), *keys])
        assert yaml.safe_load(capsys.readouterr().out)


def test_every_exception_is_of_a_command() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert every
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in every), pattern


def test_recipes_say_how_long_presets_warm_up() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    found = {}
    for warmup, epochs, names in re.findall(r"^\| (\d[\d.]*)\b.* \| ([\d,]+) \| (`\w+`.*) \|$", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = (float(warmup), int(epochs.replace(",", "")))
    presets = {path.stem: load(path) for path in PRESETS.glob("*.yaml")}
    assert found == {name: (cfg.optim.warmup_epochs, cfg.trainer.epochs) for name, cfg in presets.items()}
    for name, words in re.findall(r"\| `(mcl_\w+) ([^`]*trainer\.epochs[^`]*)` \|", text):  # of the recipes
        cfg = load(name, words.split())
        assert cfg.optim.warmup_epochs == cfg.trainer.epochs / 10


def test_the_method_says_which_loss_to_expect() -> None:
    """That of equal cosines, and that of predictions which are their own target and orthogonal to all others."""
    pattern = r"^\| `(\w+)` \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(pattern, (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    for name, *said in rows:
        cfg = load(name)
        t, targets = cfg.model.temperature, cfg.trainer.global_batch + cfg.model.queue
        least = 4 * t * (math.log(math.exp(1 / t) + targets - 1) - 1 / t)
        assert said == [f"{t:g}", f"{targets:,}", f"{4 * t * math.log(targets):.2f}", f"{least:.2f}"], name


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs and a finished run of the demo, which also replaces the run of the preset for
    ImageNet."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "data" / "photos", folder / "data" / "photos")
    shell(folder, "mkdir shards; tar cf shards/val.tar -C data/photos/val .")
    shell(folder, "mcl pretrain mcl_r18_fpn_demo")
    (folder / "runs" / "mcl").symlink_to("demo")
    return folder


def shell(folder: Path, command: str) -> str:
    for word, stand_in in INSTEAD.items():
        command = command.replace(word, stand_in)
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in PAGES if any(not not_run(command) for command in commands(page))])
def test_commands_run(page: str, user: Path, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    shutil.copytree(user, folder, symlinks=True)
    for command in commands(page):
        if not not_run(command):
            shell(folder, command)
    if page == "README.md":
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        short = example.replace("FOLDER", "data/photos/train").replace('"mine2"', '"mine2", trainer={"epochs": 3}')
        (folder / "example.py").write_text(short)
        shell(folder, "python example.py")
