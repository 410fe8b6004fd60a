"""The whole configuration, and what its sections must agree on."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from dali_pipelines.geometry import Geometry, nearest_legal
from dali_pipelines.plan import Plan
from dali_pipelines.settings import STRICT, AugmentConfig, ConfigError, DataConfig, Trait
from mcl.config.sections import EvaluationConfig, LogConfig, ModelConfig, OptimConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    name: str = "mcl"
    """Name of the run; its folder is output/name."""
    output: Annotated[str, Trait.PATH, Trait.RESUMABLE] = "runs"
    """Folder of all runs."""
    objective: Annotated[
        Literal["mcl", "supervised", "supervised_contrastive", "moco_v2", "byol"], Trait.DECIDES_SPEED
    ] = "mcl"
    """Pre-training objective. mcl: tiles of every level are matched to their own image among the targets of a momentum
    network. supervised: tiles of every level are classified. supervised_contrastive: tiles of a class are contrasted
    with tiles of other classes. These two need the class of every image. moco_v2 and byol: other methods, on whole
    images, with the same trainer, loader and backbone; they need montage.ratios=[1] and the keys of their presets."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    montage: Annotated[Geometry, Trait.DECIDES_SPEED] = Geometry()
    model: Annotated[ModelConfig, Trait.DECIDES_SPEED] = ModelConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: Annotated[EvaluationConfig, Trait.RESUMABLE] = EvaluationConfig()
    log: Annotated[LogConfig, Trait.RESUMABLE] = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels, weights = len(self.montage.ratios), len(self.model.loss_weights)
        if levels != weights:
            raise ValueError(f"model.loss_weights: {weights} weights for the {levels} levels of montage.ratios")
        if self.model.assembly == "stack":
            self._check_stack()
        if self.trainer.compile and self.trainer.recompute:
            raise ValueError("trainer.recompute: not supported by torch.compile; set it or trainer.compile to false")
        if self.trainer.compile and self.trainer.deterministic:
            raise ValueError(
                "trainer.deterministic: torch.compile chooses kernels by timing; set it or trainer.compile to false"
            )
        if self.model.init and self.trainer.init_from:
            raise ValueError("trainer.init_from: the old name of model.init, which is set as well; remove it")
        best, evaluation = self.trainer.keep_best, self.evaluation
        if best != "none" and (not evaluation.every or best not in evaluation.during):
            raise ValueError(
                f"trainer.keep_best: {best} is not evaluated during the run; set evaluation.every=1, for instance, and "
                f"evaluation.during=[{best}]"
            )
        if not is_folder_name(self.name):
            raise ValueError(f"name: {self.name!r} is not a plain folder name")
        return self

    def _check_stack(self) -> None:
        if self.model.compute == "released":
            raise ValueError(
                "model.assembly: stack computes only the map that an image's level needs, but model.compute=released "
                "needs all maps; set model.compute=matched"
            )
        if self.model.backbone != "convnext_t":
            return
        for key, cells in ("cells", self.montage.cells), *(("schedule", cells) for _, cells in self.montage.schedule):
            if cells % self.montage.ratios[-1]:
                raise ValueError(
                    "model.assembly: with stack the sides of some tiles are no multiples of 32 px, and "
                    "model.backbone=convnext_t would drop a part of them; set "
                    f"montage.{key} to multiples of {self.montage.ratios[-1]} cells, not {cells}"
                )

    def doubts(self) -> list[str]:
        """Warnings about legal values that are probably mistakes, one line each, with a suggestion."""
        optim, epochs = self.optim, self.trainer.epochs
        peak = optim.base_lr * self.trainer.global_batch / 256
        lines = []
        if optim.warmup_epochs >= epochs:
            # Of the cosine times the warm-up; x (1 + cos(pi x)) / 2 is at most 0.26 between 0 and 1.
            highest = 0.26 * epochs / optim.warmup_epochs * peak
            lines.append(
                f"optim.warmup_epochs: a warm-up of {optim.warmup_epochs:g} epochs is as long as the run "
                f"(trainer.epochs={epochs}) or longer: the learning rate stays below {highest:.2g} instead of reaching "
                f"{peak:.2g}; "
                f"set optim.warmup_epochs={epochs / 10:g}, for instance"
            )
        if optim.name != "lars" and optim.base_lr >= OptimConfig.base_lr:
            usual = 0.05 if optim.name == "sgd" else 1e-3
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for lars, which scales it down; {optim.name} hardly "
                f"converges with it; set optim.base_lr={usual:g}, for instance"
            )
        if optim.name == "lars" and optim.base_lr <= 0.02:
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for adamw or sgd; lars scales it down, so weights "
                f"hardly change; set optim.base_lr={OptimConfig.base_lr:g}, for instance"
            )
        if optim.final_lr > peak:
            lines.append(
                f"optim.final_lr: {optim.final_lr:g} is above the highest learning rate of the run, {peak:.2g} "
                "(optim.base_lr * trainer.global_batch / 256), so the rate increases until the end; set it lower"
            )
        if late := [epoch for epoch, _ in self.montage.schedule if epoch >= epochs]:
            lines.append(
                f"montage.schedule: the canvases from epoch {', '.join(map(str, late))} on are never used, since "
                f"trainer.epochs={epochs}; shorten the schedule as well"
            )
        return lines

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def loading(self) -> DataConfig:
        """``data`` for training, with ``data.dtype`` resolved."""
        half = self.trainer.precision in ("bf16", "fp16")
        dtype: Any = ("float16" if half else "float32") if self.data.dtype == "auto" else self.data.dtype
        return dataclasses.replace(self.data, dtype=dtype)

    def plan(
        self,
        size: int,
        images: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        geometry: Geometry | None = None,
        seed: int | None = None,
    ) -> Plan:
        """The plan that determines the images, crops and montages of a process in every step.

        Args:
            size: number of images in the data set.
            images: number of images per process and step.
            rank: rank of the process.
            world_size: number of processes.
            geometry: replaces ``montage``.
            seed: replaces ``trainer.seed``.

        Raises:
            ConfigError: the images of a process and step fill no whole number of canvases.
        """
        if not (geometry or self.montage).legal(images):
            near = ", ".join(map(str, nearest_legal(geometry or self.montage, images)))
            raise ConfigError(f"montage: {images} images fill no whole number of canvases; nearest legal: {near}")
        return Plan(
            seed=self.trainer.seed if seed is None else seed,
            size=size,
            images=images,
            geometry=geometry or self.montage,
            augment=self.augment,
            tile_sampling=self.data.tile_sampling,
            rank=rank,
            world_size=world_size,
        )

    def images_per_rank(self, world_size: int) -> int:
        """Images per step and process.

        Raises:
            ConfigError: trainer.global_batch is not divisible by the number of processes or makes no legal montage, or
                montage.queries do not divide its canvases.
        """
        batch = self.trainer.global_batch
        if batch % world_size:
            raise ConfigError(f"trainer.global_batch: {batch} is not divisible by {world_size} processes")
        images = batch // world_size
        geometry = self.montage
        if not geometry.legal(images):
            near = ", ".join(str(n * world_size) for n in nearest_legal(geometry, images))
            raise ConfigError(
                f"trainer.global_batch: {batch} gives {images} images per process, which fill no whole number of "
                f"canvases at montage.images_per_canvas={list(geometry.images_per_canvas)}; nearest legal: {near}"
            )
        self._check_queries(images)
        self._check_accumulate(images)
        parts = self.trainer.accumulate or 1  # auto is not resolved before the GPUs are known
        online = [canvases // parts for canvases in geometry.query_canvases(images)]
        if world_size * online[0] < 2:  # a canvas of level 0 is a single tile
            raise ConfigError(
                "montage.queries: with one query of level 0 per micro-batch, the projector's BatchNorm has a single "
                "row; use more queries, a larger trainer.global_batch or a smaller trainer.accumulate"
            )
        if min(online) * geometry.fewest_cells**2 < 2:
            key = "montage.cells" if geometry.cells == 1 else "montage.schedule"
            raise ConfigError(
                f"trainer.global_batch: with {images // parts} images per process and micro-batch and 1 "
                f"cell ({key}), BatchNorm has one value per channel; double the batch or use 2 cells"
            )
        return images

    def parts(self, images: int) -> list[int]:
        """Numbers of micro-batches that divide the canvases and the online queries of every level."""
        largest = math.gcd(*self.montage.query_canvases(images), *self.montage.canvases(images))
        return [n for n in range(1, largest + 1) if largest % n == 0]

    def _check_accumulate(self, images: int) -> None:
        online, canvases = self.montage.query_canvases(images), self.montage.canvases(images)
        legal = self.parts(images)
        if self.trainer.accumulate not in (0, *legal):
            raise ConfigError(
                f"trainer.accumulate: {images} images per process make {list(canvases)} canvases, of which "
                f"{list(online)} are online queries; these are divisible by {', '.join(map(str, legal))}, not by "
                f"{self.trainer.accumulate}"
            )

    def _check_queries(self, images: int) -> None:
        for level, every in enumerate(self.montage.queries):
            canvases = self.montage.canvases(images)[level]
            if canvases % every:
                divisors = [n for n in range(1, canvases + 1) if canvases % n == 0]
                near = [n for n in divisors if n < every][-1:] + [n for n in divisors if n > every][:1]
                raise ConfigError(
                    f"montage.queries: one in {every} of the {canvases} canvases of level {level} ({images} images per "
                    f"process) is no whole number; nearest legal: {', '.join(map(str, near))}"
                )


def is_folder_name(name: str) -> bool:
    """Whether `name` is a folder name without separators, and without control characters, which would break lines."""
    return Path(name).name == name != ".." and min(name, default="") >= " "
