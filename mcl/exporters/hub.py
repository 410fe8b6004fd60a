"""A folder for sharing: weights under canonical names, config.json, and a model card generated from the run."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from mcl.config import Config, ModelConfig, Trait, all_keys, to_dict
from mcl.evaluation.scoring import describe
from mcl.exporters.canonical import canonical_names
from mcl.exporters.files import Metadata, Weights, json_bytes
from mcl.exporters.target import Target, Twin
from mcl.models import Encoder
from mcl.records import metrics

_PRIVATE = {Trait.PATH, Trait.OF_A_MACHINE, Trait.RESUMABLE}


def about(cfg: Config, path: Path, step: int) -> Mapping[str, Any]:
    """Description of a run for the model card: its scores, and the keys that change the result, without paths.

    Args:
        path: path of the checkpoint; scores are read from its run folder.
        step: step of the checkpoint; later scores are left out.
    """
    content = to_dict(cfg)
    for key in all_keys():
        if key.traits & _PRIVATE:
            *sections, last = key.name.split(".")
            section = content
            for name in sections:
                section = section[name]
            del section[last]
    folder = path.absolute().parent.parent
    files = folder / "metrics.jsonl", folder / metrics.EVALUATIONS
    records = [r for file in files for r in metrics.read(file) if r["step"] <= step]
    training = [{k: r[k] for k in ("step", "epoch", "loss")} for r in records if r["kind"] == "train"]
    scores = [r for r in records if r["kind"] == "eval" and r["step"] == step]
    latest = {tuple(str(r.get(key)) for key in ("name", "split", "features", "labels")): r for r in scores}
    figures = {"training": training[-1:], "scores": [*latest.values()]}
    return {"config": {name: part for name, part in content.items() if part}, "figures": figures}


def _pack(weights: Weights, metadata: Metadata) -> dict[str, bytes]:
    content = safetensors.torch.save(dict(weights), {"mcl": json.dumps(metadata)})  # one field: several have no order
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"model-{sha256[:8]}.safetensors"
    environment = Environment(
        loader=PackageLoader("mcl"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("card.md").render(
        about=metadata,
        file=file,
        sha256=sha256,
        tensors=len(weights),
        values=sum(tensor.numel() for tensor in weights.values()),
        scores=[line for record in metadata["figures"]["scores"] for line in describe(record).splitlines()],
    )
    config = json_bytes({"weights": file, **metadata})
    return {file: content, "config.json": config, "README.md": card.encode()}


def _build(config: ModelConfig) -> Encoder:
    """An encoder of mcl whose state dict has the canonical names."""
    encoder = Encoder(config, [1, 2, 4, 8][: len(config.loss_weights)])
    names = canonical_names(encoder)
    back = {theirs: ours for ours, theirs in names.items()}

    def rename(state: dict[str, Any], names: Mapping[str, str]) -> None:
        for name in names:
            state[names[name]] = state.pop(name)

    hooked: Any = encoder
    hooked.register_state_dict_post_hook(lambda _, state, *__: rename(state, names))
    hooked.register_load_state_dict_pre_hook(lambda _, state, *__: rename(state, back))
    return encoder


def _fpn(encoder: Encoder, maps: Sequence[Tensor]) -> list[Tensor]:
    pyramid: list[Tensor] = encoder.fpn(maps[::-1], range(len(encoder.fpn.depths)))
    return pyramid[::-1]


def _head(encoder: Encoder, p5: Tensor) -> list[Tensor]:
    for conv in encoder.head.convs:
        p5 = conv(p5, relu=True)
    return [p5]


TARGET = Target(
    name="hub",
    rename=lambda name: name,
    parts={"backbone": r"backbone\.body\.", "fpn": r"backbone\.fpn\.", "head": r"roi_heads\.box_head\."},
    pack=_pack,
    describe=about,
    classifies=True,
    usage=lambda path, _: f"hf upload USER/NAME {shlex.quote(path)}  # state license and datasets in README.md first",
    twins=[
        Twin(
            "mcl-pretrain",
            "pip install mcl-pretrain",
            _build,
            {"backbone": lambda encoder, image: encoder.backbone(image)[::-1], "fpn": _fpn, "head": _head},
        )
    ],
    backbones=[name for key in all_keys(ModelConfig) if key.name == "backbone" for name in get_args(key.kind)],
)
