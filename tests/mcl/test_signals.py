"""Signals to any command, at any time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.mcl.distributed.test_faults import children

STUCK = """
import itertools, time
from mcl import signals
with signals.a_second_one_ends("stopping\\n"), signals.Signals():
    print("ready", flush=True)
    {what}
"""
EVALUATE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control starts with it ignored
from mcl import cli, commands
def evaluate(*_):
    print("ready", flush=True)
    time.sleep(60)
commands.evaluate = evaluate
cli.main(["evaluate", "knn", "nowhere.pt"])
"""


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs the given program, and has printed that it is ready."""
    command = [sys.executable, "-c", request.param]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "started",
    [
        STUCK.format(what="sum(itertools.repeat(0))"),  # in C code that does not release the interpreter
        STUCK.format(what="time.sleep(60)"),
    ],
    ids=["c", "python"],
    indirect=True,
)
def test_a_second_signal_ends_what_hangs(started: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """The first signal is answered at once."""
    assert started.stderr is not None
    started.send_signal(number)
    assert started.stderr.readline() == "stopping\n"
    started.send_signal(number)  # the same signal, passed on by torchrun
    time.sleep(2.2)
    assert started.poll() is None
    started.send_signal(number)
    assert started.wait(10) != 0
    assert started.stderr.readline().startswith("a second signal: this process ends within ten seconds; work since")


@pytest.mark.parametrize("started", [EVALUATE], indirect=True)
def test_ctrl_c_ends_a_verb_in_a_line(started: "subprocess.Popen[str]") -> None:
    [watcher] = children(started.pid)
    started.send_signal(signal.SIGINT)
    assert started.wait(10) == 130
    assert started.stderr is not None
    assert started.stderr.read() == "mcl evaluate: interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(watcher, 0)
