"""Timing in turns, summaries, tables and the gate."""

import json
import math
import time
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Result


def test_turns_rotate_so_that_none_always_comes_first() -> None:
    whole = list(common.turns(["a", "b", "c"], repeat=3, warmup=1))
    rounds = ["".join(name for name, _ in whole[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert [counts for _, counts in whole] == [False] * 3 + [True] * 9


def test_interleave_times_every_round_but_the_warmup() -> None:
    calls = []
    naps = {"short": 0.002, "long": 0.02}
    functions = {name: lambda n=name: (calls.append(n), time.sleep(naps[n])) for name in naps}
    seconds = common.interleave(functions, repeat=3, warmup=2)  # type: ignore[arg-type]
    assert calls == ["short", "long", "long", "short"] * 2 + ["short", "long"]
    assert {name: len(times) for name, times in seconds.items()} == {"short": 3, "long": 3}
    assert all(t >= naps[name] for name, times in seconds.items() for t in times)
    assert min(seconds["long"]) > min(seconds["short"])


def test_summary_is_median_and_relative_interquartile_range() -> None:
    result = common.summary("x", [4.0, 1.0, 3.0, 2.0, 100.0], ratio=2.0)
    assert (result["name"], result["seconds"], result["n"], result["ratio"]) == ("x", 3.0, 5, 2.0)
    assert result["spread"] == pytest.approx((52.0 - 1.5) / 3.0)  # quartiles of five values, exclusive: 1.5 and 52
    assert common.summary("x", [7.0])["spread"] == 0


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit, match="benchmarks measure a single process; start them without torchrun"):
        common.parser("")


def results(**seconds: float) -> list[Result]:
    return [{"name": name, "seconds": s} for name, s in seconds.items()]


def test_slower_names_what_is_slower_or_missing_and_nothing_else() -> None:
    before = results(same=1.0, faster=1.0, slower=1.0, within=1.0, gone=1.0)
    now = results(same=1.0, faster=0.5, slower=1.2, within=1.04, new=9.0)
    failures = common.slower(now, before, tolerance=5)
    assert [f.split(":")[0] for f in failures] == ["slower", "gone"]
    assert "20% slower" in failures[0]
    assert "not measured" in failures[1]


def test_finish_writes_json_that_serves_as_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    options = common.parser("").parse_args(["--json", str(file)])
    common.finish(options, results(a=1.0, b=2.0))
    written = json.loads(file.read_text())
    assert written["results"] == results(a=1.0, b=2.0)
    assert written["config"]["json"] == str(file)
    assert written["environment"]["cores"] >= 1
    assert written["environment"]["versions"]["torch"][0].isdigit()

    gate = common.parser("").parse_args(["--gate", str(file), "--tolerance", "10"])
    common.finish(gate, results(a=1.05, b=2.0))
    with pytest.raises(SystemExit, match=r"b: 2\.4 s, 20% slower than 2 s") as failure:
        common.finish(gate, results(a=1.05, b=2.4))
    assert failure.value.code  # text: status 1


def test_markdown_gives_numbers_three_digits() -> None:
    table = common.markdown(["what", "ms"], [("a", math.pi), ("b", 12)])
    assert table.splitlines() == ["| what | ms |", "|---|---|", "| a | 3.14 |", "| b | 12 |"]
