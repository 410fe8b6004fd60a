"""Environments of a process: home folders, caches, folders, output, locales. mcl works, or ends with one line and
status 2."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mcl import cli
from tests.conftest import ROOT
from tests.mcl.tiny import TINY

NOBODY = ["unshare", "-U", "--map-user=12345", "--map-group=12345"]
"""Runs a command as a user without passwd entry, whose permissions are those of the file modes."""

needs_user_namespaces = pytest.mark.skipif(
    subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs user namespaces: unshare -U",
)


@pytest.fixture
def tiny_file(few_photos: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    data = {**TINY["data"], "root": str(few_photos)}
    file.write_text(yaml.safe_dump({**TINY, "data": data, "output": str(tmp_path / "runs")}))
    return file


def mcl(
    *words: object, prefix: Sequence[str] = (), stdout: int | None = subprocess.PIPE, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs mcl with given arguments; variables that are None are unset."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "mcl", *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={name: value for name, value in variables.items() if value is not None},
        text=True,
        timeout=120,
        check=False,
    )


@needs_user_namespaces
def test_a_run_without_home_and_passwd_entry(tiny_file: Path, tmp_path: Path) -> None:
    words = ("pretrain", tiny_file, "trainer.epochs=1", "log.tensorboard=true", "log.preview=true")
    done = mcl(*words, prefix=NOBODY, HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == 0, done.stderr
    warning = "warning: the index of sizes cannot be kept in ~/.cache/mcl/index (there is no home folder): "
    assert warning in (tmp_path / "runs" / "tiny" / "train.log").read_text() + done.stderr
    assert not list(tmp_path.glob("**/~"))


@needs_user_namespaces
def test_a_home_a_cache_and_a_temporary_folder_that_cannot_be_written(tiny_file: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    folder = str(closed)
    done = mcl("index", tiny_file, prefix=NOBODY, HOME=folder, XDG_CACHE_HOME=folder, TMPDIR=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "  index: could not be written"
    assert f"the index of sizes cannot be kept in {closed}/mcl/index (Permission denied): every start" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_of_compiled_code_that_cannot_be_written(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/cache")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", str(tiny_file), "trainer.compile=true"])
    assert (
        "trainer.compile: /proc/cache, the cache folder of torch.compile, cannot be written" in capsys.readouterr().err
    )


def test_no_current_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = mcl("doctor", prefix=["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mcl doctor: error: the current folder was deleted; change to one that exists\n"


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/no/where"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor"])
    assert "no folder for temporary files is writable; set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "locale"),
    [
        ("Vögel 鳥", {}),
        pytest.param("birds", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.soak),
    ],
    ids=["C", "C without UTF-8"],
)
def test_names_that_the_locale_cannot_show(
    tiny_file: Path, tmp_path: Path, few_photos: Path, folder: str, locale: dict[str, str]
) -> None:
    root = tmp_path / folder
    root.symlink_to(few_photos)
    words = (f"data.root={root}", f"output={tmp_path}/Läufe", "name=ä", "trainer.epochs=1")
    done = mcl("pretrain", tiny_file, *words, LC_ALL="C", PYTHONIOENCODING="ascii", COLUMNS="0", **locale)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "checkpoints/last.pt" in done.stdout.splitlines()[-1]
    assert (tmp_path / "Läufe" / "ä" / "checkpoints" / "last.pt").exists()


def test_a_run_continues_if_nobody_reads_its_output(tiny_file: Path, tmp_path: Path) -> None:
    """On a full disk, or if the reader of a pipe has ended. Standard error has nothing that train.log lacks."""
    with open("/dev/full", "w") as full:
        done = mcl("pretrain", tiny_file, "trainer.epochs=1", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "runs" / "tiny" / "train.log").read_text()
    assert "last.pt" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert log.count("optim.warmup_epochs: a warm-up of 1 epochs is as long as the run (trainer.epochs=1)") == 1


def test_output_that_is_closed_or_full(tiny_file: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh"]
    assert mcl("index", tiny_file, prefix=closed).returncode == 0
    with open("/dev/full", "w") as full:
        done = mcl("index", tiny_file, stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "mcl index: error: the output cannot be written (No space left on device)"


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "{file}", f"name={LONG}"],
        ["pretrain", "{file}", f"output=/tmp/{LONG}"],
        ["pretrain", "{file}", f"model.init=/tmp/{LONG}"],
        ["pretrain", f"/tmp/{LONG}.yaml"],
        ["index", "{file}", f"data.root=/tmp/{LONG}"],
        ["evaluate", "knn", f"/tmp/{LONG}.pt"],
        ["preview", "{file}", "--output", f"/tmp/{LONG}"],
        ["export", f"/tmp/{LONG}.pt", "--to", "timm"],
        ["import-openselfsup", f"/tmp/{LONG}.pth"],
    ],
    ids=lambda words: f"{words[0]} {words[-1].partition('=')[0][:12]}",
)
def test_names_that_are_too_long(arguments: list[str], tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([word.format(file=tiny_file) for word in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"mcl {arguments[0]}: error: " in line
    assert LONG in line


def test_an_index_in_a_folder_whose_name_is_too_long(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"cannot be kept in .* \(File name too long\)"):
        cli.main(["index", str(tiny_file), f"data.index=/tmp/{LONG}"])
    assert capsys.readouterr().out.splitlines()[-1] == "  index: could not be written"
