"""Fuzzing with atheris, a Python version of libFuzzer: ``make fuzz``, or ``python -m tests.fuzz --help``."""

import argparse
import contextlib
import io
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import atheris

PACKAGES = ["PIL", "tarfile", "zipfile", "json", "yaml", "mcl", "dali_pipelines"]
# Hides the names of all instrumented modules.
with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=PACKAGES):
    from tests.fuzz.targets import TARGETS  # branches in these packages guide the search

CPU_SECONDS = 2  # limit per input; instrumented code is slower
MEGABYTES = 256
SECONDS_IN_C = 60  # wall-clock limit, after which code that does not return to Python is killed


class Slow(BaseException):
    """Not an Exception, so that the code under test does not catch it."""


class Result(NamedTuple):
    name: str
    tried: int
    finding: str
    """Empty if there is none."""


def fuzz(name: str, folder: Path, seconds: int) -> Result:
    """Fuzzes a target in a separate process, which may crash; stops at the first finding.

    Args:
        name: name of the target.
        folder: folder for the log, findings, and inputs that reached new code, with which the next run starts.
        seconds: duration.
    """
    corpus, log = folder / name, folder / f"{name}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS_IN_C}", "-rss_limit_mb=4096"]
    options = [*limits, f"-artifact_prefix={folder}/{name}-", str(corpus)]
    process = get_context("fork").Process(target=run, args=(name, options, log))
    process.start()
    process.join()
    text = log.read_text(errors="replace")
    tried = max(map(int, re.findall(r"^#(\d+)", text, re.MULTILINE)), default=0)
    written = re.search(r"Test unit written to (\S+)", text)
    return Result(name, tried, (f"{written[1]}, see " if written else "see ") + str(log) if process.exitcode else "")


def run(name: str, options: Sequence[str], log: Path | None = None) -> None:
    """Runs libFuzzer, which ends the process.

    Args:
        name: name of the target.
        options: options of libFuzzer. Folders among them are corpora; if there are files, only these are read.
        log: file for messages.
    """
    if log is not None:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    own, good, dictionary = folder / "own", folder / "good", folder / "dictionary"
    own.mkdir()
    good.mkdir()
    read = target.reader(own)
    for i, data in enumerate(target.good()):
        read(data)
        (good / str(i)).write_bytes(data)
    escaped = ("".join(map("\\x{:02x}".format, word.encode())) for word in ("mcl", *target.words))
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    signal.signal(signal.SIGPROF, _expire)

    def once(data: bytes) -> None:
        try:
            with _limits():
                read(data)
        except BaseException as error:
            ours = type(error).__module__.partition(".")[0] in ("mcl", "dali_pipelines")
            if not ours or "\n" in str(error):
                traceback.print_exc()
                os.abort()  # then libFuzzer writes the input

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        def change(old: bytes) -> bytes:
            return atheris.Mutate(old, max(most, len(old)))  # type: ignore[no-any-return]

        return (target.mutate(data, change, Random(seed)) if seed % 2 else change(data))[:most]

    corpora = [] if any(map(os.path.isfile, options)) else [str(good)]
    atheris.Setup([name, f"-dict={dictionary}", *options, *corpora], once, custom_mutator=mutate)
    atheris.Fuzz()


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits the time and memory of an input.

    Raises:
        Slow, MemoryError: the input needed more.
    """
    before = _peak()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (grown := _peak() - before) > MEGABYTES:
            raise MemoryError(f"an input takes {grown} MB")


def _expire(*_: Any) -> None:
    raise Slow(f"an input takes more than {CPU_SECONDS} s")


def _peak() -> int:
    """Peak memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=5, help="in all")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="of logs, inputs and findings")
    parser.add_argument("--input", help="read this file alone, which is a finding of the target")
    options = parser.parse_args()
    names = options.names or list(TARGETS)
    if options.input:
        run(names[0], [options.input])
    seconds = int(60 * options.minutes / len(names))
    failed, took = False, float(seconds)  # includes the start of a target
    for done, name in enumerate(names):
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + took * (len(names) - done)))
        print(f"{name:<12}{done + 1:>3} of {len(names)}, all until {end}", end="", flush=True)
        began = time.time()
        result = fuzz(name, options.folder, seconds)
        took = time.time() - began
        print(f"{result.tried:>9} inputs  {result.finding}", flush=True)
        failed |= bool(result.finding)
    sys.exit(failed)


if __name__ == "__main__":
    main()
