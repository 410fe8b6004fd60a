"""``mcl export``: writes the weights of a checkpoint for another library."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mcl import __version__, config
from mcl.config import Config, ConfigError
from mcl.exporters import (
    detectron2,
    hub,
    mmdet,
    mmpretrain,
    statistics,
    timm,
    torchvision,
    transformers,
    ultralytics,
)
from mcl.exporters.canonical import PARTS, canonical_names
from mcl.exporters.files import default_path, write, write_folder
from mcl.exporters.summary import Report
from mcl.exporters.target import Target
from mcl.exporters.verify import verify
from mcl.models import Encoder, GlobalEncoder
from mcl.objectives import Objective, build
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError

TARGETS = {
    target.name: target
    for target in (
        mmdet.RCNN,
        mmdet.RETINANET,
        mmpretrain.TARGET,
        detectron2.TARGET,
        torchvision.RESNET,
        torchvision.DETECTION,
        timm.TARGET,
        transformers.DETR,
        transformers.DETR_RESNET,
        transformers.RT_DETR,
        ultralytics.TARGET,
        hub.TARGET,
    )
}


def export(
    path: Path,
    to: str,
    *,
    parts: Sequence[str] = (),
    network: Literal["online", "target"] = "online",
    statistics_of: str = "",
    check: bool = False,
    output: Path | None = None,
    classifier: bool = False,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Report:
    """Writes the weights of a checkpoint for another library.

    Args:
        path: checkpoint of mcl.
        to: one of ``TARGETS``.
        parts: parts of the model to export: backbone, fpn, head; empty for all parts that the target supports.
        network: online, or target, which is the momentum network. Its BatchNorm statistics are re-estimated on
            data.root, since training does not compute statistics for its weights.
        statistics_of: folder of photographs on which BatchNorm's statistics are re-estimated; none: keep those of
            training; empty: data.root for a library that freezes BatchNorm, none for others.
        check: before writing, load the weights into the library's own model and compare features.
        output: file to write, or folder if the library reads one; by default ``<run folder>/exports/<to>.<ending>``, or
            ``<stem>.<to>.<ending>`` next to a checkpoint outside of a run folder.
        classifier: also export the classifier of region features of objective=supervised, and the names of its classes.
        overrides: ``key=value`` words, or values by dotted keys, for instance the current location of data.root.

    Raises:
        CheckpointError: the checkpoint cannot be read, the verification fails, or `output` cannot be written.
        ConfigError: the target does not support the parts or the classifier, or the checkpoint does not have them; the
            target does not read files with the ending of `output`; a library is not installed; or there are no
            photographs to re-estimate statistics on.
        SourceError: there are no images for `network` target.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to: {to!r} is not a target; targets are {', '.join(TARGETS)}")
    target = TARGETS[to]
    parts = _parts(target, parts)
    output = output or default_path(path, target.name + next(iter(target.saves), ""))
    if target.pack is None and output.suffix not in target.saves:
        raise ConfigError(f"--output: {output}: {to} reads only files that end in {' or '.join(target.saves)}")
    state = checkpoint.load(path)
    cfg = config.override(config.from_dict(state["config"]), overrides)
    with torch.device("meta"):  # without initial values, which take longer than everything else
        model = build(cfg, state.get("classes", ()))
    checkpoint.restore(model, state["model"], path)
    _check_backbone(target, cfg.model.backbone)
    target.check(cfg.model, parts)
    _check_parts(target, parts, model.online, cfg)
    classes = _classifier(target, model) if classifier else {}

    if network == "target" and model.target is None:
        raise ConfigError(f"--network: objective={cfg.objective} has no momentum network; export the online one")
    encoder = model.online if network == "online" else statistics.of_montages(model.target, cfg)
    measured = "as training left them" if network == "online" else "re-estimated on montages"
    if statistics_of != "none" and (statistics_of or target.freezes):
        encoder, measured = statistics.of_photographs(encoder, cfg, statistics_of)
    weights, names = _rename(encoder, network, target, parts, cfg.model.backbone)
    infinite = [name for name, tensor in {**weights, **classes}.items() if not tensor.isfinite().all()]
    if infinite:
        raise CheckpointError(
            f"{path}: weights are not finite, e.g. {infinite[0]}; export an earlier checkpoint of the run"
        )
    verified = verify(target, weights, parts, encoder, cfg.model) if check else None
    if classes:
        weights, names, parts = {**weights, **classes}, names | {n: n for n in classes}, [*parts, "classifier"]
    metadata = _metadata(cfg, network, parts, state["step"]) | {"statistics": measured}
    metadata |= {"classes": list(model.classes)} if classes else {}
    metadata |= target.describe(cfg, path, state["step"])
    if target.pack is None:
        write(output, path, partial(target.saves[output.suffix], weights, metadata))
    else:
        write_folder(output, path, target.pack(weights, metadata))
    usage = target.usage(str(output), cfg.model.backbone)
    unmapped = tuple(name for name in model.state_dict() if name not in names)
    return Report(output, metadata, weights, names, unmapped, usage, verified)


def _parts(target: Target, wanted: Sequence[str]) -> list[str]:
    """The wanted parts in the target's order; all of the target's if none are wanted."""
    for part in wanted:
        if part not in PARTS:
            raise ConfigError(f"--parts: no part {part!r}; parts are {', '.join(PARTS)}")
        if part not in target.parts:
            raise ConfigError(f"--parts: {target.name} has no place for the {part}; it takes {', '.join(target.parts)}")
    return [part for part in target.parts if part in wanted or not wanted]


def _check_backbone(target: Target, backbone: str) -> None:
    if backbone not in target.backbones:
        others = [other.name for other in TARGETS.values() if backbone in other.backbones]
        raise ConfigError(
            f"--to {target.name}: model.backbone={backbone} is not supported{': ' * bool(target.lacks)}{target.lacks}; "
            f"targets that support it: {', '.join(others)}"
        )


def _check_parts(target: Target, parts: Sequence[str], encoder: Encoder | GlobalEncoder, cfg: Config) -> None:
    """Raises a ConfigError if the encoder does not have the parts and FPN maps that the target reads."""
    if isinstance(encoder, GlobalEncoder):
        if set(parts) - {"backbone"}:
            raise ConfigError(f"--parts: objective={cfg.objective} has neither FPN nor head; use --parts backbone")
        return
    wanted, trained = [f"P{n}" for n in target.maps], {f"P{5 - depth}" for depth in encoder.fpn.depths}
    lacking = [name for name in wanted if name not in trained]
    if "fpn" in parts and lacking:
        others = ",".join(part for part in target.parts if part != "fpn")
        raise ConfigError(
            f"--parts: {target.name} reads {', '.join(wanted)} of an FPN; montage.ratios={list(cfg.montage.ratios)} "
            f"trained no {', '.join(lacking)}; export without FPN: --parts {others}"
        )
    if "head" in parts and not cfg.model.head_convs:
        raise ConfigError("--parts: model.head_convs=0, so there is no head to export; use --parts backbone,fpn")


def _classifier(target: Target, model: Objective) -> dict[str, Tensor]:
    """The classifier's tensors, by their names in a checkpoint."""
    if not target.classifies:
        raise ConfigError(
            f"--classifier: {target.name} has no place for it, since it reads features of the region head, not maps of "
            "the backbone; use --to hub"
        )
    if model.classifier is None:
        raise ConfigError(f"--classifier: objective={model.config.objective} has no classifier; remove the option")
    return {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}


def _rename(
    encoder: Encoder, network: str, target: Target, parts: Sequence[str], backbone: str
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of these parts by the target's names, and the target's names by the checkpoint's."""
    weights, names = {}, {}
    state = encoder.state_dict()
    for ours, canonical in canonical_names(encoder).items():
        theirs = target.name_of(canonical, backbone) if ours.partition(".")[0] in parts else None
        if theirs is not None:
            names[f"{network}.{ours}"] = theirs
            weights[theirs] = state[ours].detach().contiguous().clone()
    return target.adapt(weights), names


def _metadata(cfg: Config, network: str, parts: Sequence[str], step: int) -> dict[str, Any]:
    resnet = cfg.model.backbone.startswith("res")
    return {
        "method": "MCL (arXiv 2304.02010)" if cfg.objective == "mcl" else cfg.objective,
        "mcl": __version__,
        "step": step,
        "network": network,
        "parts": list(parts),
        "backbone": cfg.model.backbone,
        "width": cfg.model.width,
        "head_convs": cfg.model.head_convs,
        "input": "RGB",
        "mean": list(cfg.augment.mean),
        "std": list(cfg.augment.std),
        "range": "mean and std are of pixel values from 0 to 1",
        **({"stride": "in the 3x3 convolutions (STRIDE_IN_1X1 False)"} if resnet else {}),
    }
