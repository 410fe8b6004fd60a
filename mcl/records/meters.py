"""Measurements of a run without waiting for the device: means of losses, speed and waiting times."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mcl.objectives import Output
from mcl.records import collapse
from mcl.records.metrics import Record
from mcl.records.timers import HostClock, Timer


class Meter:
    """Means over the steps since the last reading, kept on the device; only reading waits for it.

    Args:
        levels: of the montage.
        scores: names of those that outputs have.
        device: where outputs are.
        scaled: the loss is scaled, and steps with an infinite gradient are left out: they are no failure.
        skips: nor is whatever makes a gradient infinite or NaN; such steps count for no mean.
    """

    def __init__(
        self, levels: int, scores: Sequence[str], device: torch.device, scaled: bool = False, skips: bool = False
    ) -> None:
        self._scores, self._scaled, self._skips = tuple(scores), scaled, skips
        self._sums = torch.zeros(1 + len(scores), levels, device=device)  # losses, scores: means of all views
        self._totals = torch.zeros(2, device=device)  # loss, gradient norm
        self._count = 0
        self._latest: Output | None = None
        self._skipped = torch.tensor(0, device=device)  # since the last reading
        self._in_a_row = torch.tensor(0, device=device)
        self._failed_step = torch.tensor(-1, device=device)
        self._failed_levels = torch.zeros(levels, dtype=torch.bool, device=device)

    def add(self, step: int, output: Output, grad_norm: Tensor) -> None:
        """Takes a step's results in, without waiting for them."""
        finite = grad_norm.isfinite()
        counts = finite if self._skips else torch.ones_like(finite)
        values = torch.stack([x.mean(0) for x in (output.losses, *(output.scores[name] for name in self._scores))])
        norm = grad_norm.nan_to_num(0, 0, 0) if self._scaled else grad_norm
        totals = torch.stack([output.loss.detach(), norm.to(output.loss.dtype)])
        self._sums += torch.where(counts, values, 0)
        self._totals += torch.where(counts, totals, 0)
        self._count += 1
        self._latest = output
        self._skipped += ~finite
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        failed = ~output.losses.isfinite().all(0) & counts  # (L,)
        # Clipping turns an infinite gradient into NaN weights.
        overflow = torch.zeros_like(finite) if self._scaled or self._skips else ~finite
        first = (failed.any() | overflow) & (self._failed_step < 0)
        self._failed_levels |= failed & first
        self._failed_step = torch.where(first, step, self._failed_step)

    def read(self) -> Record:
        """Means since the last call, how many steps were left out, and the last step's figures of collapse."""
        skipped = int(self._skipped)
        counted = self._count - (skipped if self._skips else 0)
        losses, *scores = (self._sums / counted).tolist()
        loss, grad_norm = (self._totals / counted).tolist()
        self._sums.zero_()
        self._totals.zero_()
        self._skipped.zero_()
        self._count = 0
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "loss_level": losses,
            **dict(zip(self._scores, scores, strict=True)),
            **(collapse.figures(self._latest) if self._latest else {}),
            "skipped": skipped,
        }

    def failure(self) -> tuple[int, list[int]] | None:
        """First step (from 0) that was not finite, and the levels whose loss was not: none if only the gradient was."""
        step = int(self._failed_step)
        return None if step < 0 else (step, self._failed_levels.nonzero().flatten().tolist())

    def skipped_in_a_row(self) -> int:
        """Steps, up to the last one, whose gradient was not finite."""
        return int(self._in_a_row)


class Stopwatch:
    """Speed, time left, and the shares of time spent waiting for the loader, saving, and in the phases of the steps.

    Args:
        steps: that this process will do.
        phases: times them.
    """

    def __init__(self, steps: int, phases: Timer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._left, self._phases = clock, steps, phases
        self._trainer = Timer(HostClock(clock))
        self._start = self._settled = self._window = clock()
        self._images = self._done = 0

    def waiting(self) -> AbstractContextManager[None]:
        """Times a wait for the loader: on a GPU its own, and not that of a host that is ahead of it."""
        return self._phases.phase("data_wait")

    def saving(self) -> AbstractContextManager[None]:
        """Times how long a checkpoint keeps the training."""
        return self._trainer.phase("saving")

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Within it nothing is trained: the time counts for the seconds left, and not for speed and shares."""
        start = self._clock()
        yield
        spent = self._clock() - start
        self._window += spent
        if not self._done:
            self._start += spent

    def lap(self, images: int) -> None:
        """Counts a step."""
        self._done += 1
        self._images += images
        if self._done == 1:  # which also filled the pipelines
            self._settled = self._clock()

    def read(self) -> Record:
        """Speed (images/s) and shares since the last call, seconds left by the mean pace so far. Waits for the device.

        What is missing from 1 is the trainer's own work, and on a GPU other time in which it had nothing to do.
        """
        times = {"data_wait": 0.0, "saving": 0.0} | self._trainer.read() | self._phases.read()
        now = self._clock()
        elapsed = now - self._window
        several = self._done > 1
        pace = (now - self._settled) / (self._done - 1) if several else (now - self._start) / max(1, self._done)
        record = {
            "images_per_s": self._images / elapsed,
            **{name: seconds / elapsed for name, seconds in times.items()},
            "eta_s": pace * (self._left - self._done),
        }
        self._window, self._images = now, 0
        return record
