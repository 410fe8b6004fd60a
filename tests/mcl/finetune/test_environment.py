"""``mcl finetune`` in environments without home folder, passwd entry or reader of the output."""

import os
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from tests.mcl.finetune.conftest import MINI, TINY
from tests.mcl.test_environment import NOBODY, mcl, needs_user_namespaces


@needs_user_namespaces
@pytest.mark.parametrize(
    ("root", "code"), [("/no/where", 2), pytest.param("{folder}", 0, marks=pytest.mark.soak)], ids=["error", "run"]
)
def test_without_home_and_passwd_entry(folder: Path, tmp_path: Path, root: str, code: int) -> None:
    """The libraries of MMDetection fail on import if no home folder is known."""
    words = [f"data.root={root.format(folder=folder)}", f"output={tmp_path}", "train_cfg.max_iters=1"]
    done = mcl("finetune", MINI, *TINY, *words, prefix=NOBODY, HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert done.stderr.splitlines()[-1] == "mcl finetune: error: data.root: /no/where does not exist"


@pytest.mark.soak
def test_a_reader_that_has_enough(folder: Path, tmp_path: Path) -> None:
    """The reader of the output closes the pipe; pycocotools prints, too."""
    reads, writes = os.pipe()
    os.close(reads)
    words = [f"data.root={folder}", f"output={tmp_path}", "train_cfg.max_iters=1"]
    done = mcl("finetune", MINI, *TINY, *words, stdout=writes)
    os.close(writes)
    assert done.returncode == 141
    assert "BrokenPipeError" not in done.stderr.splitlines()[-1]
