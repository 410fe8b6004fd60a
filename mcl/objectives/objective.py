"""Interface of objectives. A pre-training method is one subclass, in its own file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.source import Source
from mcl.config import Config, ConfigError, all_keys, value


@dataclass(frozen=True)
class Output:
    """Output of one step, with V views or directions (query view first) and L levels. All but `loss` are detached.

    `embeddings` and `targets` are optional; records measure collapse with them (:mod:`mcl.records.collapse`).
    """

    loss: Tensor  # () total, with gradient
    losses: Tensor  # (V, L) before weights and constant factors
    scores: Mapping[str, Tensor]  # (V, L), by the names in Objective.scores
    embeddings: Sequence[Sequence[Tensor]] = ()  # of the online network: per view and level, (R, D)
    targets: Sequence[Tensor] = ()  # per view (B, levels that have targets, D), of the whole step

    def detach(self) -> Self:
        return replace(self, loss=self.loss.detach())

    @classmethod
    def mean(cls, outputs: Sequence["Output"]) -> "Output":
        """Mean of the outputs of equal parts of a step."""
        if len(outputs) == 1:
            return outputs[0]

        def mean(values: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(values)).mean(0)

        scores = {name: mean([o.scores[name] for o in outputs]) for name in outputs[0].scores}
        embeddings = [view for o in outputs for view in o.embeddings]
        return cls(
            mean([o.loss for o in outputs]), mean([o.losses for o in outputs]), scores, embeddings, outputs[0].targets
        )


class Objective(nn.Module):
    """Networks and loss of a pre-training method. A step must not read values on the host.

    A step calls :meth:`prepare` once, :meth:`forward` for each micro-batch, and :meth:`finish` after the last one.
    Everything that these methods change, such as running statistics or a queue, must be a buffer: checkpoints contain
    buffers, and a skipped step restores them.

    Args:
        config: configuration of the run.
        classes: names of the classes of the images, if they have any.

    Attributes:
        online: network that is evaluated and exported; it has a ``backbone``.
        target: copy of it without gradients, or None; only :func:`mcl.train.ema.update` changes it, after every step.
        classifier: classifier of region features, or None; exported on request.
    """

    scores: ClassVar[tuple[str, ...]] = ()
    """Names of the scores in :attr:`Output.scores`, and in records."""
    labelled: ClassVar[bool] = False
    """Whether every image must have a class; checkpoints then contain the names of the classes."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Keys that the objective does not use; values other than their defaults are errors."""
    retrieves: ClassVar[bool] = False
    """Whether it implements :meth:`matches`, for the evaluation retrieval."""

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.config, self.classes = config, tuple(classes)
        self.online: Any = None
        self.target: Any = None
        self.classifier: Any = None

    @classmethod
    def check(cls, config: Config, source: Source | None = None) -> None:
        """Checks the configuration and the images before any work starts; subclasses add their own checks.

        Args:
            config: configuration of the run.
            source: the images; None if they are not known.

        Raises:
            ConfigError: keys that exclude each other, or images without a class.
        """
        for key in all_keys():
            if key.name in cls.unused and (given := value(config, key.name)) != key.default:
                raise ConfigError(
                    f"{key.name}: {given}, but objective={config.objective} does not use it; set "
                    f"{key.name}={key.default}, or another objective"
                )
        if cls.labelled and source is not None:
            without = (source.labels < 0).nonzero()[0]
            if len(without):
                raise ConfigError(
                    f"objective: {config.objective} needs the class of every image, and {len(without)} in data.root "
                    f"have none, the first: {source.names[int(without[0])]}; use class folders or a list with classes"
                )

    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> Any:
        """Computes without gradients what all micro-batches of a step share, such as targets.

        Args:
            parts: query and key view of each micro-batch (:meth:`~dali_pipelines.batch.MontageBatch.part`).
        """

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Any = None) -> Output:
        """Loss of a micro-batch.

        Args:
            query: query view.
            key: key view.
            prepared: result of :meth:`prepare` for the step; None: the micro-batch is the whole step.
        """
        raise NotImplementedError

    def finish(self, prepared: Any) -> None:
        """Updates buffers after the backward pass of a step; `prepared` is the result of :meth:`prepare`."""

    def matches(self, query: MontageBatch, key: MontageBatch) -> Tensor:
        """Share of tiles whose nearest target in the other view is that of their own image: (V, L)."""
        raise NotImplementedError

    def compile_parts(self) -> None:
        """Compiles backbones and heads in place with ``torch.compile``, when they are first called."""
        for encoder in filter(None, (self.online, self.target)):
            encoder.backbone.compile()
            encoder.head.compile()
