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
    """Means over the steps since the last reading, kept on the device; only reading waits for the device.

    Args:
        levels: number of levels of the montage.
        scores: names of the scores that outputs have.
        device: device of the outputs.
        scaled: whether the loss is scaled; then steps with an infinite gradient are skipped and are not failures.
        skips: whether all steps with an infinite or NaN gradient are skipped; they are not failures, and do not enter
            the means.
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
        """Adds a step's results, without waiting for the device."""
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
        # An infinite gradient is a failure, too: clipping it makes weights NaN.
        overflow = torch.zeros_like(finite) if self._scaled or self._skips else ~finite
        first = (failed.any() | overflow) & (self._failed_step < 0)
        self._failed_levels |= failed & first
        self._failed_step = torch.where(first, step, self._failed_step)

    def read(self) -> Record:
        """Means since the last call, the number of skipped steps, and the last step's figures of collapse."""
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
        """First step (from 0) with a loss or gradient that was not finite, and the levels whose loss was not finite.

        None if there was none. The levels are empty if only the gradient was not finite.
        """
        step = int(self._failed_step)
        return None if step < 0 else (step, self._failed_levels.nonzero().flatten().tolist())

    def skipped_in_a_row(self) -> int:
        """Number of consecutive steps, up to the last one, whose gradient was not finite."""
        return int(self._in_a_row)


class Stopwatch:
    """Speed, time left, and the shares of time spent waiting for the loader, saving, and in the phases of the steps.

    Args:
        steps: number of steps that this process will do.
        phases: timer of the phases of steps.
        clock: returns the time in seconds.
    """

    def __init__(self, steps: int, phases: Timer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._left, self._phases = clock, steps, phases
        self._trainer = Timer(HostClock(clock))
        self._start = self._settled = self._window = clock()
        self._images = self._done = 0

    def waiting(self) -> AbstractContextManager[None]:
        """Times a wait for the loader; on a GPU, how long the GPU waits, not how long the host does."""
        return self._phases.phase("data_wait")

    def saving(self) -> AbstractContextManager[None]:
        """Times how long saving a checkpoint stops the training."""
        return self._trainer.phase("saving")

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Excludes time without training from speed and shares; the estimate of the time left includes it."""
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
        if self._done == 1:  # the first step also fills the pipelines
            self._settled = self._clock()

    def read(self) -> Record:
        """Speed (images/s) and shares since the last call, and the seconds left at the mean pace. Waits for the device.

        The rest of the shares to 1 is the trainer's own work and, on a GPU, other time in which the GPU was idle.
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
