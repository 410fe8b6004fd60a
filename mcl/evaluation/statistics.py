"""BatchNorm statistics of evaluation: re-estimated, since training leaves running ones behind its moving weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[None]:
    """Replaces all running statistics by plain means over the batches that the model sees within.

    The model is in training mode there, without gradients, and in evaluation mode afterwards.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    model.train()
    with torch.no_grad():
        yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
