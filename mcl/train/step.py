"""A training step: forward, backward, clipping, optimiser, momentum network. The host never waits for the device."""

import contextlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_pipelines.batch import MontageBatch
from mcl import distributed, ops
from mcl.config import Config, ConfigError
from mcl.objectives import Objective, Output
from mcl.records.timers import Timer
from mcl.train import ema
from mcl.train.graphs import CudaRecorder, Graphed
from mcl.train.optim import AUTOCAST, LossScaler, build_optimizer, load_state, set_learning_rate


class TrainingStep:
    """One step: forward, backward, clipping, optimiser and momentum network.

    Args:
        config: configuration of the run.
        model: moved in place to the device and to the dtype of ``trainer.precision``.
        device: device of this process.

    Raises:
        ConfigError: keys that exclude each other, or that the device does not support.
    """

    def __init__(self, config: Config, model: Objective, device: torch.device) -> None:
        self._config, self._device, self.model = config, device, model
        trainer = config.trainer
        self._dtype = torch.float64 if trainer.precision == "fp64" else torch.float32
        if trainer.compile:
            _check_cache()
            if device.type == "cuda":
                _check_compiler()
            model.compile_parts()
        model.to(device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._skips = trainer.on_nonfinite == "skip" or trainer.precision == "fp16"
        self.optimizer = build_optimizer(config.optim, model)
        self.scaler = LossScaler(device.type, trainer.max_loss_scale, trainer.precision == "fp16")
        self.timer = Timer.on(device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        buffers = list(model.buffers()) if self._skips else []
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self._target, self._online = (
            list(m.parameters()) if model.target else [] for m in (model.target, model.online)
        )
        self._module = model if distributed.world_size() == 1 else self._parallel()
        self._gradients = Graphed(self._backward, self._recorder()) if trainer.cuda_graph else self._backward

    def __call__(self, query: MontageBatch, key: MontageBatch, lr: float, momentum: float) -> tuple[Output, Tensor]:
        """Updates the model.

        Args:
            query, key: both views, on the device or on the host.
            lr: learning rate.
            momentum: momentum of the moving average.

        Returns:
            The model's output, detached, and the norm of the gradient before clipping, (). If the norm is not finite,
            and ``trainer.on_nonfinite`` is skip or the precision fp16, only the loss scale has changed.
        """
        dtype = None if self._config.trainer.precision in AUTOCAST else self._dtype
        query, key = query.to(self._device, dtype), key.to(self._device, dtype)
        set_learning_rate(self.optimizer, lr)
        if not self._config.trainer.cuda_graph:  # a graph writes to the gradients that it was recorded with
            self.optimizer.zero_grad(set_to_none=True)
        before = [_joined(buffers) for buffers in self._buffers]
        with self.timer.phase("graph") if self._config.trainer.cuda_graph else contextlib.nullcontext():
            output = self._gradients(query, key)
        with self.timer.phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = ops.clip_grad_norm_(self._parameters, self._config.optim.clip_norm or float("inf"))
            # Gradients are averages over all processes, so all processes decide alike. Unlike the scaler's flag, the
            # norm also detects that squares of finite gradients overflow, after which clipping would give zeros.
            found_inf = (~grad_norm.isfinite()).float() if self._skips else None
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
            self.optimizer.step()
            self.scaler.update()
            if self._target:
                ema.update(self._target, self._online, momentum, found_inf)
            if found_inf is not None:
                self._restore_buffers(before, found_inf)
        return output, grad_norm

    def state_dict(self) -> dict[str, Any]:
        """State of ``optimizer`` and ``scaler``."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`, also of an earlier version; other keys are ignored."""
        load_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _restore_buffers(self, before: list[Tensor], found_inf: Tensor) -> None:
        """Restores buffers if `found_inf` is not 0; all buffers of a dtype in few launches."""
        for buffers, joined in zip(self._buffers, before, strict=True):
            parts = torch.where(found_inf == 0, _joined(buffers), joined).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast for ``trainer.precision``."""
        dtype = AUTOCAST.get(self._config.trainer.precision)
        return torch.autocast(self._device.type, dtype) if dtype else contextlib.nullcontext()

    def _backward(self, query: MontageBatch, key: MontageBatch) -> Output:
        """Computes loss and gradients, accumulated over all micro-batches."""
        count = self._config.trainer.accumulate
        parts = [(query.part(i, count), key.part(i, count)) for i in range(count)]
        with self._phase("forward"), self.autocast():
            prepared = self.model.prepare(parts)
        outputs = []
        for i, views in enumerate(parts):
            with self._communicating(i == count - 1):
                with self._phase("forward"), self.autocast():
                    output: Output = self._module(*views, prepared)
                with self._phase("backward"):
                    self.scaler.scale(output.loss / count).backward()
            outputs.append(output.detach())
        self.model.finish(prepared)
        return Output.mean(outputs)

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A graph cannot be timed in parts."""
        return contextlib.nullcontext() if self._config.trainer.cuda_graph else self.timer.phase(name)

    def _communicating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Averages gradients over ranks after the last micro-batch only."""
        if last or not isinstance(self._module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._module.no_sync()

    def _parallel(self) -> nn.Module:
        devices = [self._device.index] if self._device.type == "cuda" else None
        # Buffers are equal on all ranks; gradients are views of the buckets.
        parallel = DistributedDataParallel(self.model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self._config.trainer.deterministic:
            parallel.register_comm_hook(None, distributed.average_in_order)
        return parallel

    def _recorder(self) -> CudaRecorder:
        if self._device.type != "cuda":
            raise ConfigError("trainer.cuda_graph: needs a CUDA device; use trainer.cuda_graph=false")
        if distributed.world_size() > 1:
            raise ConfigError("trainer.cuda_graph: supports one process only; use trainer.cuda_graph=false")
        return CudaRecorder(self.model.buffers(), lambda: self.optimizer.zero_grad(set_to_none=True))


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _check_compiler() -> None:
    """Raises ConfigError if what torch.compile builds for a GPU cannot be compiled: a launcher in C."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), "")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not compiler or not header.is_file():
        raise ConfigError(
            "trainer.compile: on a GPU torch.compile needs a C compiler and the headers of Python "
            f"({'no gcc or clang' if not compiler else f'no {header}'}); install gcc and python3-dev, or set "
            "trainer.compile=false"
        )


def _check_cache() -> None:
    """Raises ConfigError if the cache folder of torch.compile cannot be written."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"trainer.compile: {folder}, the cache folder of torch.compile, cannot be written ({error.strerror}); "
            "set TORCHINDUCTOR_CACHE_DIR to a writable folder"
        ) from None
