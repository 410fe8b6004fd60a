"""Writes tables of results into README files and documents: ``python -m benchmarks.readme``.

A table is between ``<!-- benchmarks/results/NAME.json -->`` and ``<!-- end -->``. For an excerpt of a result's first
table, list columns and then rows, by their first cells: ``<!-- benchmarks/results/NAME.json (A; B) (row; row) -->``.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import end_to_end, kernels, loader, step, transfer_report
from benchmarks.common import ROOT, Result, markdown

FILES = ("README.md", "docs/performance.md", "docs/transfer.md")
TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "kernels": kernels.table,
    "loader": loader.table,
    "step_r18": step.table,
    "step_r50": step.table,
    "end_to_end": end_to_end.table,
    "transfer": transfer_report.table,
    "ablation": transfer_report.table,
    "peers": transfer_report.table,
}

_SECTION = re.compile(
    r"(<!-- benchmarks/results/(\w+)\.json(?: \((.*?)\) \((.*?)\))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def render(text: str) -> str:
    """A document with its tables generated from the results."""

    def section(match: re.Match[str]) -> str:
        start, name, columns, rows, end = match.groups()
        report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        table = TABLES[name](report["results"])
        shown = f"{table}\n\n{machine(report)}" if columns is None else excerpt(table, columns, rows)
        return f"{start}\n{shown}\n\n{end}"

    return _SECTION.sub(section, text)


def excerpt(tables: str, columns: str, rows: str) -> str:
    """Some columns and rows, separated by semicolons, of the first of several tables.

    Raises:
        ValueError, KeyError: the table has no such column or row.
    """
    first = tables.partition("\n\n")[0].splitlines()
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in first)
    places, cells = [header.index(column) for column in columns.split("; ")], {row[0]: row for row in body}
    return markdown([header[i] for i in places], [[cells[row][i] for i in places] for row in rows.split("; ")])


def machine(report: dict[str, Any]) -> str:
    """Where and when results were measured."""
    where, config = report["environment"], report["config"]
    device = where["gpu"] or f"{where['cpu']}, {where['cores']} cores, {where['capability']}"
    rounds = f"; medians of {config['repeat']} rounds" if "repeat" in config else ""
    others = f" On another machine or by other versions: {', '.join(config['others'])}." if config.get("others") else ""
    return f"{device}; torch {where['versions']['torch']}; {where['date']}{rounds}.{others}"


if __name__ == "__main__":
    for name in FILES:
        path = ROOT / name
        path.write_text(render(path.read_text()))
