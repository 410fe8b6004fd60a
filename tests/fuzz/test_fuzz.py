"""A short fuzzing run, and planted faults that it must find."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="atheris has no release for CPython 3.14"),
]

PLANTED = """
import ctypes, sqlite3
from pathlib import Path
from tests.fuzz import __main__ as fuzzing
from tests.fuzz.targets import Target

def read(data):
    if data[:1] == b"!":
        {fault}

if __name__ == "__main__":
    fuzzing.SECONDS_IN_C = 5
    fuzzing.TARGETS["planted"] = Target(lambda: [b"good"], lambda folder: read)
    print(fuzzing.fuzz("planted", Path({folder!r}), 300).finding)
"""

FOREVER = "WITH RECURSIVE c(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"


def test_for_a_minute(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "1", "--folder", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise KeyError(3)", "KeyError: 3"),
        ("ctypes.string_at(0)", "deadly signal"),
        ("while True: pass", "Slow: an input takes more than 2 s"),
        (f"sqlite3.connect(':memory:').execute({FOREVER!r}).fetchone()", "libFuzzer: timeout"),
        ("bytearray(400 << 20)", "MemoryError: an input takes 4"),
    ],
)
def test_finds_planted_faults(tmp_path: Path, fault: str, said: str) -> None:
    code = PLANTED.format(fault=fault, folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    finding, _, log = result.stdout.splitlines()[-1].partition(", see ")
    assert Path(finding).read_bytes().startswith(b"!")
    assert said in Path(log).read_text()
