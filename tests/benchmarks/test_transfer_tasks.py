"""Tasks of the transfer benchmark: commands that need each other, stopped and continued."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.transfers import tasks
from benchmarks.transfers.protocol import ProtocolError
from benchmarks.transfers.tasks import Outcome, Task


def python(code: str) -> tuple[str, ...]:
    return ("-c", code)


def do(planned: Sequence[Task], folder: Path, jobs: int = 2, seconds: float = 60) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    with tasks.locked(folder) as lock:
        return tasks.run(planned, folder, jobs, lock, seconds=seconds, say=said.append), said


def test_tasks_wait_for_what_they_need_and_are_done_once(tmp_path: Path) -> None:
    log, finished = tmp_path / "log", list[str]()
    planned = [
        Task("first", python(f"import time; time.sleep(0.3); open({str(log)!r}, 'a').write('first ')")),
        *(
            Task(
                name,
                python(f"open({str(log)!r}, 'a').write('then ')"),
                needs="first",
                finish=lambda name=name: finished.append(name),
            )
            for name in ("a", "b")
        ),
    ]
    outcome, said = do(planned, tmp_path / "t")
    assert outcome == Outcome({}, [], 0)
    assert log.read_text() == "first then then "
    assert sorted(finished) == ["a", "b"]
    assert said[0] == "first: started"
    hours = tasks.hours(tmp_path / "t", "first")
    assert hours["starts"] == 1
    assert 0.3 / 3600 < hours["wall"] < 20 / 3600
    assert 0 < hours["cpu"] <= hours["wall"]

    outcome, said = do(planned, tmp_path / "t")
    assert log.read_text() == "first then then "
    assert sorted(said) == ["a: done", "b: done", "first: done"]


def test_a_task_that_fails_is_shown_and_the_others_go_on(tmp_path: Path) -> None:
    planned = [
        Task("bad", python("print('the reason'); raise SystemExit(3)")),
        Task("after", python("pass"), needs="bad"),
        Task("unreadable", python("pass"), finish=lambda: (tmp_path / "nowhere").read_text()),
        Task("good", python("pass")),
    ]
    outcome, said = do(planned, tmp_path / "t")
    assert outcome.failed.keys() == {"bad", "after", "unreadable"}
    assert outcome.failed["bad"] == "exit code 3"
    assert outcome.failed["after"] == "bad failed"
    assert outcome.failed["unreadable"].startswith("FileNotFoundError: ")
    assert not outcome.left
    assert "good: done" in said
    assert any(line.startswith("bad: failed with exit code 3; ") and "    the reason" in line for line in said)

    fixed = [Task("bad", python("pass")), *planned[1:2]]  # the record of a failure is no obstacle
    assert do(fixed, tmp_path / "t")[0] == Outcome({}, [], 0)
    assert tasks.hours(tmp_path / "t", "bad")["starts"] == 2


def test_time_that_is_up_stops_what_runs(tmp_path: Path) -> None:
    planned = [Task("long", python("import time; time.sleep(60)")), Task("next", python("pass"), needs="long")]
    start = time.monotonic()
    outcome, _ = do(planned, tmp_path / "t", seconds=0.5)
    assert outcome == Outcome({}, ["long", "next"], 0)
    assert time.monotonic() - start < 30
    assert not tasks.read(tmp_path / "t", "long")["done"]


def test_a_signal_stops_what_runs(tmp_path: Path) -> None:
    planned = [Task("long", python(f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"))]
    assert do(planned, tmp_path / "t")[0] == Outcome({}, ["long"], signal.SIGTERM)


def test_workers_of_what_is_stopped_are_stopped_too(tmp_path: Path) -> None:
    """Even those that do not notice that their parent has gone, and hold the lock."""
    code = (
        "import os, signal, subprocess, time; worker = subprocess.Popen(['sleep', '60'], close_fds=False); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(worker.pid)); "
        f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    )
    assert do([Task("long", python(code))], tmp_path / "t")[0].left == ["long"]
    with tasks.locked(tmp_path / "t"):
        worker = Path("/proc", (tmp_path / "pid").read_text(), "stat")
        assert not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_work_folder_has_one_user(tmp_path: Path) -> None:
    with (
        tasks.locked(tmp_path),
        pytest.raises(ProtocolError, match=r"in use by another run"),
        tasks.locked(tmp_path, patience=0.1),
    ):
        pass


def test_what_a_stopped_command_leaves_is_waited_for(tmp_path: Path) -> None:
    with tasks.locked(tmp_path) as lock:
        left = subprocess.Popen(["sleep", "1"], pass_fds=(lock,))
    with pytest.raises(ProtocolError, match=r"in use by another run"), tasks.locked(tmp_path, patience=0):
        pass
    with tasks.locked(tmp_path):
        assert left.wait(timeout=5) == 0
