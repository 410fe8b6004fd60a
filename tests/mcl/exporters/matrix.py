"""The table of docs/export.md: every backbone in every target. ``python -m tests.mcl.exporters.matrix`` writes it.

Its check marks are the cases of ``test_backbones.py``, which verifies them.
"""

import re
from typing import get_args

from mcl.config import ModelConfig
from mcl.exporters import TARGETS
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "export.md"
BACKBONES: tuple[str, ...] = get_args(ModelConfig.__annotations__["backbone"])
CASES = [(to, name) for name in BACKBONES for to, t in TARGETS.items() if t.twins and name in t.backbones]
"""Pairs of target and backbone that can be verified."""
_START, _END = "\n| |", "\n\n## MMDetection\n"
_PINS = [*(ROOT / "requirements").glob("*.txt"), ROOT / "mcl" / "finetune" / "install" / "openmmlab.txt"]
_LETTERS = "abcdefghijklmnop"


def render() -> str:
    """The table, and the reasons for cells without a check mark."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", "\n".join(file.read_text() for file in _PINS), re.MULTILINE))
    packages = [target.twins[0].package if target.twins else "" for target in TARGETS.values()]
    reasons: list[str] = []

    def cell(to: str, name: str) -> str:
        if (to, name) in CASES:
            return "✓"
        lacks = TARGETS[to].lacks if name not in TARGETS[to].backbones else ""
        reason = lacks or f"{to} is on no package index: a test compares names and shapes"
        reasons.extend([reason] * (reason not in reasons))
        return _LETTERS[reasons.index(reason)]

    rows = [
        ["", *(f"`{to}`" for to in TARGETS)],
        ["---", *[":-:"] * len(TARGETS)],
        ["", *(f"{package} {pins.get(package, '')}".strip() for package in packages)],
        *([f"`{name}`", *(cell(to, name) for to in TARGETS)] for name in BACKBONES),
    ]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    return table + "\n\n" + "\n".join(f"* {a}: {reason}" for a, reason in zip(_LETTERS, reasons, strict=False))


def written() -> str:
    """The table in the page."""
    text = PAGE.read_text()
    return text[text.index(_START) + 1 : text.index(_END)]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(written(), render()))
