"""Rounds, progress, summaries, tables and ``--gate``."""

import json
import math
import time
from operator import itemgetter
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Result


def test_the_order_rotates_and_the_first_round_is_a_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def turn(name: str, counts: bool) -> int:
        calls.append(name if counts else name.upper())
        return len(calls)

    values = common.rounds(["a", "b", "c"], 3, turn)
    assert "".join(calls) == "ABCbcacababc"
    assert values == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "warm-up, a",
        *("round 1 of 3, b", "round 2 of 3, c", "round 3 of 3, a"),
    ]
    assert "3 of 12 done, 00:00 elapsed, 00:00 left" in lines[1]
    assert common.rounds([], 3, turn) == {}


def test_progress_prints_a_line_after_a_long_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(common.time, "monotonic", lambda: now)
    for seconds in common.progress([1, 40, 1], "{} s".format, per_line=3):
        now += seconds
    assert capsys.readouterr().err.splitlines() == [
        "1 s: 0 of 3 done, 00:00 elapsed, ? left",
        "1 s: 2 of 3 done, 00:41 elapsed, 00:20 left",
    ]


def test_interleave_times_all_rounds_but_the_warm_up_without_output(capsys: pytest.CaptureFixture[str]) -> None:
    naps = {"short": 0.002, "long": 0.02}
    seconds = common.interleave({name: lambda n=n: time.sleep(n) for name, n in naps.items()}, repeat=3)  # type: ignore[misc]
    assert {name: len(times) for name, times in seconds.items()} == {"short": 3, "long": 3}
    assert all(t >= naps[name] for name, times in seconds.items() for t in times)
    assert min(seconds["long"]) > min(seconds["short"])
    assert capsys.readouterr().err == ""


def test_summary_is_median_and_relative_interquartile_range() -> None:
    result = common.summary("x", [4.0, 1.0, 3.0, 2.0, 100.0], ratio=2.0)
    assert (result["name"], result["seconds"], result["n"], result["ratio"]) == ("x", 3.0, 5, 2.0)
    # Exclusive quartiles of the five values are 1.5 and 52.
    assert result["spread"] == pytest.approx((52.0 - 1.5) / 3.0)
    assert common.summary("x", [7.0])["spread"] == 0


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit, match="benchmarks measure a single process; start them without torchrun"):
        common.argument_parser("", repeat=1)


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
    options = common.argument_parser("", repeat=1).parse_args(["--json", str(file)])
    common.finish(options, results(a=1.0, b=2.0))
    written = json.loads(file.read_text())
    assert written["results"] == results(a=1.0, b=2.0)
    assert written["config"]["json"] == str(file)
    assert written["environment"]["cores"] >= 1
    assert written["environment"]["versions"]["torch"][0].isdigit()

    gate = common.argument_parser("", repeat=1).parse_args(["--gate", str(file), "--tolerance", "10"])
    common.finish(gate, results(a=1.05, b=2.0))
    with pytest.raises(SystemExit, match=r"b: 2\.4 s, 20% slower than 2 s") as failure:
        common.finish(gate, results(a=1.05, b=2.4))
    assert failure.value.code  # a text, so the exit status is 1


def test_tables_leave_out_what_is_empty() -> None:
    rows: list[Result] = [{"name": "a", "ms": math.pi, "x": 0.0}, {"name": "b", "ms": 12345.6, "ratio": 0.5}]
    columns = {
        "what": itemgetter("name"),
        "ms": itemgetter("ms"),
        "ratio": "{ratio:.0%}".format_map,
        "x": itemgetter("x"),
        "nothing": itemgetter("nothing"),
    }
    table = common.tables((rows, columns), ([], columns))
    assert table.splitlines() == [
        "| what | ms | ratio | x |",
        "|---|---|---|---|",
        "| a | 3.14 |  | 0 |",
        "| b | 12,346 | 50% |  |",
    ]
