"""Commands that depend on each other, some at once, each continued until it is done.

Of every task there is a record, ``<name>.json`` (``done``, and ``starts``: seconds of each, by the clock and of its
processes), and a log, ``<name>.log``. Seconds come from the kernel when a command ends; while it runs the record is
brought up to date every few seconds, so that a start that was killed together with this process counts, too.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.transfers.protocol import ROOT, ProtocolError, write
from mcl.distributed.signals import Signals

_POLL, _NOTE, _PATIENCE = 0.2, 5.0, 60.0  # seconds
LINGER = 5.0
"""Seconds in which processes that were killed let go of the lock."""
_TICKS = os.sysconf("SC_CLK_TCK")
LOG_LINES = 12
"""Of a failed task, that are shown."""


@dataclass(frozen=True)
class Task:
    name: str
    command: tuple[str, ...]  # arguments of Python
    needs: str | None = None  # the task that must be done before
    finish: Callable[[], object] = field(default=lambda: None)  # called when it is done; its errors are the task's


@dataclass(frozen=True)
class Outcome:
    failed: Mapping[str, str]  # why, by task
    left: Sequence[str]  # neither done nor failed
    signal: int  # that stopped it, or 0


class _Running:
    """A started command."""

    def __init__(self, task: Task, folder: Path, environment: Mapping[str, str], lock: int) -> None:
        self.task, self._folder, self._begun = task, folder, time.monotonic()
        self._record = read(folder, task.name)
        self._record["starts"].append({})
        with open(folder / f"{task.name}.log", "ab") as log:
            log.write(f"$ python {' '.join(task.command)}\n".encode())
            log.flush()
            # The lock goes along: what outlives this process keeps the folder.
            self._process = subprocess.Popen(
                [sys.executable, *task.command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
            )
        self._noted = self._begun
        self._note(0.0)

    def ended(self) -> int | None:
        """Exit code, None while it runs."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self._noted > _NOTE:
                self._note(_cpu_seconds(self._process.pid))
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        # Of itself and of those of its children that it waited for.
        self._note(usage.ru_utime + usage.ru_stime)
        return self._process.returncode

    def finish(self) -> None:
        """What comes after exit code 0."""
        self._record["done"] = True
        write(self._folder / f"{self.task.name}.json", json.dumps(self._record, indent=1) + "\n")
        self.task.finish()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def workers(self) -> list[int]:
        """Handles of the processes that it started, which stand for them even when their numbers are given anew."""
        handles = []
        for pid in _descendants(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        return handles

    def _note(self, cpu: float) -> None:
        self._noted = time.monotonic()
        self._record["starts"][-1] = {"wall_s": round(self._noted - self._begun, 2), "cpu_s": round(cpu, 2)}
        write(self._folder / f"{self.task.name}.json", json.dumps(self._record, indent=1) + "\n")


def run(
    tasks: Sequence[Task],
    folder: Path,
    jobs: int,
    lock: int,
    seconds: float = float("inf"),
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Does tasks, the first ones first, until all are done or failed, a signal comes, or time is up.

    Commands are then ended by SIGTERM, and by SIGKILL those that do not end within a minute.

    Args:
        tasks: those that others need stand before them.
        folder: of records and logs.
        jobs: commands at once.
        lock: descriptor of a lock that commands hold, too.
        seconds: after which everything is stopped.
        environment: of the commands; None: that of this process.
        say: takes what happens, in lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    waiting, running = list(tasks), list[_Running]()
    done, failed = set[str](), dict[str, str]()

    def conclude(name: str, finish: Callable[[], object]) -> None:
        try:
            finish()
        except Exception as error:  # results of one task that cannot be read are no reason to end the others
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name}: failed: {failed[name]}")
        else:
            done.add(name)
            say(f"{name}: done")

    with Signals() as signals:

        def signalled() -> int:
            return signals.received

        while (waiting or running) and not signalled() and time.monotonic() < end:
            for task in list(waiting):
                if task.needs in failed:
                    waiting.remove(task)
                    failed[task.name] = f"{task.needs} failed"
                    say(f"{task.name}: failed: {failed[task.name]}")
                elif task.needs is None or task.needs in done:
                    if read(folder, task.name)["done"]:
                        waiting.remove(task)
                        conclude(task.name, task.finish)
                    elif len(running) < jobs:
                        waiting.remove(task)
                        say(f"{task.name}: started")
                        running.append(_Running(task, folder, dict(environment or os.environ), lock))
            for each in list(running):
                code = each.ended()
                if code is None:
                    continue
                running.remove(each)
                if code == 0:
                    conclude(each.task.name, each.finish)
                elif not signalled():  # Ctrl-C reaches commands, too
                    failed[each.task.name] = f"exit code {code}"
                    log = folder / f"{each.task.name}.log"
                    say(f"{each.task.name}: failed with exit code {code}; the end of {log}:\n{_tail(log)}")
                else:
                    waiting.append(each.task)
            time.sleep(_POLL)
        left = [each.task.name for each in running] + [task.name for task in waiting]
        _stop(running)
        return Outcome(failed, left, signalled())


def _stop(running: Sequence[_Running]) -> None:
    # Workers of a DataLoader whose parent is killed would wait for ever for somebody to read their batch.
    workers = [handle for each in running for handle in each.workers()]
    alive = list(running)
    for each in alive:
        each.send(signal.SIGTERM)
    end = time.monotonic() + _PATIENCE
    while alive := [each for each in alive if each.ended() is None]:
        if time.monotonic() > end:
            for each in alive:
                each.send(signal.SIGKILL)
        time.sleep(_POLL)
    for handle in workers:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def read(folder: Path, name: str) -> dict[str, Any]:
    """The record of a task."""
    path = folder / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"done": False, "starts": []}
    return record


def hours(folder: Path, name: str) -> dict[str, float]:
    """Of all starts of a task: ``wall``, by the clock, ``cpu``, of all its processes, and the number of ``starts``."""
    starts = read(folder, name)["starts"]
    wall, cpu = (sum(start[key] for start in starts) / 3600 for key in ("wall_s", "cpu_s"))
    return {"wall": wall, "cpu": cpu, "starts": len(starts)}


@contextlib.contextmanager
def locked(folder: Path, patience: float = LINGER) -> Iterator[int]:
    """Holds the lock of a work folder.

    Args:
        patience: seconds to wait for it, so that the command that continues can follow the stopped one at once.

    Raises:
        ProtocolError: another process holds it for longer.
    """
    end = time.monotonic() + patience
    with open(folder / "lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ProtocolError(
                        f"{folder}: in use by another run, or by what a killed one left running; wait for it, or end it"
                    ) from None
            time.sleep(_POLL)
        yield file.fileno()


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def _cpu_seconds(pid: int) -> float:
    """Of a process and of those that it started."""
    return sum(_own_cpu_seconds(each) for each in (pid, *_descendants(pid)))


def _own_cpu_seconds(pid: int) -> float:
    """Of a process, and of the children that it waited for."""
    try:
        # Behind the name, which may hold anything: user and system ticks, its own and those of ended children.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return 0.0
    return sum(map(int, ticks)) / _TICKS


def _descendants(pid: int) -> list[int]:
    """Processes that one started, and that those did, as long as they live."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it or a thread of it has just ended
        return []
    children = [int(child) for children in lists for child in children.split()]
    return [each for child in children for each in (child, *_descendants(child))]
