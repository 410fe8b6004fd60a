"""Multi-Level Contrastive Learning (arXiv 2304.02010): fast pre-training of detection backbones.

The names of ``__all__`` are the public interface; `docs/python.md` has an example of each (`docs/predict.md` that of
``detect``, `docs/embed.md` that of ``embed``). They are imported when they are first used, so that ``import mcl`` takes
no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dali_pipelines.loader import MontageLoader
    from mcl import ops
    from mcl.api import Run, detect, embed, evaluate, export, load_backbone, load_config, pretrain

__version__ = "0.1.0"

__all__ = [
    "MontageLoader",
    "Run",
    "detect",
    "embed",
    "evaluate",
    "export",
    "load_backbone",
    "load_config",
    "ops",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mcl' has no attribute {name!r}")
    if name == "ops":
        return import_module("mcl.ops")
    return getattr(import_module("dali_pipelines.loader" if name == "MontageLoader" else "mcl.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
