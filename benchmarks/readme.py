"""Puts measured tables into README files and documents: ``python -m benchmarks.readme``.

A table stands between ``<!-- benchmarks/results/NAME.json -->`` and ``<!-- end -->``.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import end_to_end, kernels, loader, step, transfer_report
from benchmarks.common import ROOT, Result

FILES = ("README.md", "kernels/README.md", "dali_pipelines/README.md", "docs/transfer.md")
TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "kernels": kernels.table,
    "loader": loader.table,
    "step_r18": step.table,
    "step_r50": step.table,
    "end_to_end": end_to_end.table,
    "transfer": transfer_report.table,
}

_SECTION = re.compile(r"(<!-- benchmarks/results/(\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """A document with its tables made anew from the results."""

    def section(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        return f"{start}\n{TABLES[name](report['results'])}\n\n{machine(report)}\n\n{end}"

    return _SECTION.sub(section, text)


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
