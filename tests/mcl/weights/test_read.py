"""Checkpoints of others: recognised by their names, mapped without a loss, or refused."""

import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mcl.config import Config, ConfigError, ModelConfig
from mcl.exporters import TARGETS, export
from mcl.exporters.canonical import canonical_names, part
from mcl.exporters.openselfsup import their_name
from mcl.objectives import MCL
from mcl.train.checkpoint import CheckpointError
from mcl.weights.read import Taken, backbone_tensors, read, take
from tests.mcl.exporters.test_detectron2 import OTHERS, box_head, fpn, match, resnet18

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> State:
    """torchvision's, of random weights."""
    return torchvision.models.resnet18().state_dict()


def canonical(model: MCL, network: str = "online") -> State:
    encoder = model.get_submodule(network)
    state = encoder.state_dict()
    return {name: state[ours] for ours, name in canonical_names(encoder).items()}


def taken(source: str | Path, model: MCL, *parts: str) -> Taken:
    return take(read(str(source), "model.init"), canonical(model), model.config.model.backbone, parts)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        torch.save(content, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return write


def is_backbone(found: Taken, expected: Mapping[str, Tensor]) -> bool:
    """Whether the backbone alone was taken, of these tensors by torchvision's names."""
    names = {f"backbone.body.{name}" for name in expected if not name.startswith("fc.")}
    return found.weights.keys() == names and all(
        torch.equal(tensor, expected[name.removeprefix("backbone.body.")]) for name, tensor in found.weights.items()
    )


# ------------------------------------------------------------------------------------------------ round trips


WRITTEN = [(name, end) for name, t in TARGETS.items() for end in t.saves or [""] if name != "ultralytics-rtdetr"]
WRITTEN.remove(("torchvision-detection", ".pth"))  # a ResNet-50, whose other file tells as much


@pytest.mark.parametrize(("to", "ending"), WRITTEN)
def test_what_is_written_is_read(
    to: str,
    ending: str,
    model: MCL,
    saved: Path,
    resnet50: tuple[MCL, Path],
    resnet18vd: tuple[MCL, Path],
    tmp_path: Path,
) -> None:
    """Every tensor bit for bit; recognised as well as named."""
    others = {"torchvision-detection": resnet50, "transformers-rtdetr": resnet18vd}
    model, saved = others.get(to, (model, saved))
    report = export(saved, to, statistics_of="none", output=tmp_path / f"x{ending}")
    expected = canonical(model)
    for source in (f"{report.path}", f"{to}:{report.path}"):
        found = taken(source, model)
        names = {found.prefix + found.names[name] for name in found.weights}
        assert len(names) == len(report.weights)
        assert all(any(name.endswith(theirs) for theirs in report.weights) for name in names)
        assert {part(name) for name in found.weights} == set(report.metadata["parts"])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())
        assert not found.unmapped
        assert not found.shapes


def test_a_checkpoint_of_ours(model: MCL, saved: Path) -> None:
    for source, network in ((f"{saved}", "online"), (f"mcl:{saved}", "online"), (f"target:{saved}", "target")):
        found = taken(source, model)
        expected = canonical(model, network)
        assert found.weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())
        assert str(found).startswith(
            f"{source}: backbone 120, fpn 48, head 24 tensors, named as mcl does under {network}"
        )


# ------------------------------------------------------------------------------------------------ others' checkpoints

PREFIXES = (
    *("module.", "backbone.", "encoder_q.", "teacher.", "model.", "module.encoder_q.", "student.backbone."),
    *("online_net.0.", "model.backbone.encoder.", "any.name.at.all."),
)


@pytest.mark.parametrize(
    ("container", "prefix"),
    [*(("", prefix) for prefix in PREFIXES), *((name, "module.") for name in ("state_dict", "model", "teacher"))],
)
def test_prefixes(container: str, prefix: str, model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    state: Any = {prefix + name: tensor for name, tensor in resnet.items()}
    found = taken(save({container: state, "epoch": 3} if container else state), model)
    assert is_backbone(found, resnet)
    assert found.unmapped == tuple(f"{container}.{prefix}fc.{x}".lstrip(".") for x in ("weight", "bias"))


def test_moco(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    """As its main_moco.py saves: both encoders and a queue, an optimiser beside; here in half precision."""
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in resnet.items()}
    state = {f"module.encoder_q.{name}": tensor for name, tensor in half.items()}
    state |= {f"module.encoder_k.{name}": torch.zeros_like(tensor) for name, tensor in half.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03}]}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": {**state, "module.queue": torch.ones(2, 3)}}
    path = save({**content, "optimizer": optimizer})
    found = taken(path, model)
    assert is_backbone(found, {name: tensor.to(resnet[name].dtype) for name, tensor in half.items()})
    assert all(tensor.dtype == canonical(model)[name].dtype for name, tensor in found.weights.items())
    said = str(found)
    assert said.startswith(
        f"{path}: backbone 120 tensors, named as torchvision does under state_dict.module.encoder_q; "
    )
    assert "no fpn: none of its tensors is there; no head: none" in said
    assert "module (125)" in said
    assert not any(tensor.any() for tensor in taken(f"encoder_k:{path}", model).weights.values())


def test_old_checkpoints_have_no_counts(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    old = {name: tensor for name, tensor in resnet.items() if "num_batches" not in name}
    assert is_backbone(taken(save(old), model), old)


def test_lightly_numbers_the_children(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    network = torchvision.models.resnet18()
    network.load_state_dict(resnet)
    state = nn.Sequential(*list(network.children())[:-1]).state_dict()
    found = taken(save({"state_dict": {f"backbone.{name}": tensor for name, tensor in state.items()}}), model)
    assert is_backbone(found, resnet)
    assert found.convention == "lightly"


def test_the_authors_training_checkpoint(model: MCL, save: Callable[[Any], Path]) -> None:
    """Their names are compared with those of their own code in the tests of mcl import-openselfsup."""
    state = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    backbone = {n.replace("encoder_q.0.", "backbone."): t for n, t in state.items() if n.startswith("encoder_q.0.")}
    path = save({"state_dict": backbone | state, "meta": {"epoch": 100}})
    for source, network in ((f"{path}", "online"), (f"encoder_k:{path}", "target")):
        found, expected = taken(source, model), canonical(model, network)
        assert found.convention == "mcl-released"
        assert found.weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())


def test_soco(model: MCL, save: Callable[[Any], Path]) -> None:
    """MMDetection's FPN is called neck, the head's convolutions are numbered from 1; momentum networks have _k."""
    expected = canonical(model)
    state: State = {}
    for momentum in ("", "_k"):
        for name, tensor in expected.items():
            kinds = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}
            match name.split("."):
                case ["backbone", "body", *rest]:
                    theirs = ".".join([f"encoder{momentum}", *rest])
                case ["backbone", "fpn", kind, i, module, leaf]:
                    theirs = f"neck{momentum}.{kinds[kind]}.{i}.{('conv', 'bn')[int(module)]}.{leaf}"
                case ["roi_heads", "box_head", i, module, leaf]:
                    theirs = f"head{momentum}.{('conv', 'bn')[int(module)]}{int(i) + 1}.{leaf}"
            state[f"module.{theirs}"] = torch.zeros_like(tensor) if momentum else tensor
    state["module.head.fc1.weight"] = torch.ones(2)
    found = taken(save({"opt": {}, "model": state, "epoch": 400}), model)
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())
    assert found.convention == "soco"


def test_a_whole_model_of_detectron2(model: MCL, saved: Path, tmp_path: Path, save: Callable[[Any], Path]) -> None:
    """A Mask R-CNN that has found our weights by the endings of its names, and was saved by itself."""
    endings = read(str(export(saved, "detectron2", statistics_of="none", output=tmp_path / "x.pkl").path), "").tensors
    shapes = resnet18("backbone.bottom_up") | fpn((64, 128, 256, 512), 16) | box_head(16)
    found = match({name.removeprefix("model."): () for name in endings if name.startswith("model.")}, shapes)
    state = {name: endings[f"model.{found[name]}"] for name in shapes} | {n: torch.ones(s) for n, s in OTHERS.items()}
    got = taken(save({"model": state, "iteration": 9}), model)
    expected = {name: tensor for name, tensor in canonical(model).items() if "num_batches" not in name}
    assert got.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.weights.items())


def test_timm(model: MCL, save: Callable[[Any], Path]) -> None:
    state = timm.create_model("resnet18").state_dict()
    assert is_backbone(taken(save({"state_dict": state, "arch": "resnet18"}), model), state)


def test_a_detector_of_torchvision_without_normalisation_in_its_fpn(save: Callable[[Any], Path]) -> None:
    """Its backbone is taken; why its FPN is not is said."""
    with torch.device("meta"):
        model = MCL(Config(model=ModelConfig(hidden=32, head_convs=0)))
    path = save(state_of("fasterrcnn_resnet50_fpn", weights_backbone=None))
    found = taken(path, model)
    assert {part(name) for name in found.weights} == {"backbone"}
    assert re.search(r"no fpn: 32 of its 40 tensors are missing, the first: backbone\.fpn\.inner_blocks", str(found))
    with pytest.raises(
        CheckpointError, match=r"x\.pth: holds no whole fpn, named as torchvision-detection does: 32 of"
    ):
        taken(path, model, "backbone", "fpn")


def test_parts(model: MCL, saved: Path) -> None:
    assert {part(name) for name in taken(saved, model, "backbone").weights} == {"backbone"}
    assert {part(name) for name in taken(saved, model, "backbone", "head").weights} == {"backbone", "head"}


# ------------------------------------------------------------------------------------------------ refused


def state_of(name: str, **options: Any) -> State:
    """Of zeros, as many as are in the model, of which a file holds one."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name, **options).state_dict()
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "resnet34",
            r"no whole resnet18, named as torchvision does: \d+ others are there, .* layer1\.2.* It is a resnet34",
        ),
        ("resnet50", r"no whole resnet18, .*: \d+ of its 100 tensors are of another shape, .* It is a resnet50"),
        ("wide_resnet50_2", r"no whole resnet18, .*instead of \[64, 64, 3, 3\]\. Names in it begin with layer3"),
        ("vit_b_32", r"nothing of a resnet18, as mmdet, .* name it; names in it begin with encoder\.layers \(144\)"),
        ("mobilenet_v3_small", r"nothing of a resnet18"),
    ],
)
def test_other_networks(name: str, said: str, model: MCL, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pth: holds {said}"):
        taken(save(state_of(name)), model)


def test_less_than_the_whole_backbone(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    """A shallower network, one that lacks a tensor, and one in which it is of another shape."""
    thirty_four = {n.removeprefix("backbone.body."): t for n, t in backbone_tensors("resnet34").items()}
    with pytest.raises(
        CheckpointError, match=r"x\.pth: holds no whole resnet34, .* missing, .*layer1\.2\.conv1\.weight"
    ):
        take(read(str(save(resnet)), "x"), {f"backbone.body.{n}": t for n, t in thirty_four.items()}, "resnet34")
    lacking = {name: tensor for name, tensor in resnet.items() if name != "layer4.1.bn2.running_var"}
    with pytest.raises(
        CheckpointError, match=r"1 of its 100 tensors are missing, the first: layer4\.1\.bn2\.running_var"
    ):
        taken(save(lacking), model)
    with pytest.raises(
        CheckpointError, match=r"another shape, the first: conv1\.weight, \[64, 1, 7, 7\] instead of \[64, 3"
    ):
        taken(save({**resnet, "conv1.weight": torch.zeros(64, 1, 7, 7)}), model)


@pytest.mark.parametrize("content", [[1], {"state_dict": 3}, {3: torch.ones(1)}, {"a": 1}, {}, None, torch.ones(2)])
def test_what_holds_no_weights(content: Any, model: MCL, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: holds no tensors with names"):
        taken(save(content), model)


def test_weights_that_are_not_finite(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: weights are not finite, e\.g\. bn1\.weight"):
        taken(save({**resnet, "bn1.weight": torch.full((64,), torch.nan)}), model)


def test_words_before_a_file(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    path = save({"student": resnet, "teacher": {name: tensor + 1 for name, tensor in resnet.items()}})
    assert is_backbone(taken(f"teacher:{path}", model), {name: tensor + 1 for name, tensor in resnet.items()})
    assert is_backbone(taken(f"torchvision:{path}", model), resnet)
    with pytest.raises(CheckpointError, match="holds nothing of a resnet18, as detectron2 name it"):
        taken(f"detectron2:{path}", model)
    with pytest.raises(CheckpointError, match="holds nothing of a resnet18 under taecher"):
        taken(f"taecher:{path}", model)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: cannot read \(No such file"):
        taken("mmdet:nowhere.pth", model)
    odd = path.rename(path.with_name("a:b.pth"))
    assert is_backbone(taken(odd, model), resnet)


# ------------------------------------------------------------------------------------------------ libraries


@pytest.fixture
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # else it tries for three quarters of a minute


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("torchvision:resnet18", r"https://download\.pytorch\.org/models/resnet18-f37072fd\.pth"),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V1", r"\S+/resnet50-0676ba61\.pth"),
        ("timm:resnet18.a1_in1k", r"https://huggingface\.co/timm/resnet18\.a1_in1k/resolve/main/model\.safetensors"),
    ],
)
def test_without_a_network_the_file_is_named(source: str, url: str, model: MCL) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^{source}: cannot download {url} \(.*\); .* and set model\.init=FILE$"
    ):
        taken(source, model)


@pytest.mark.usefixtures("_no_network")
def test_what_a_library_has_downloaded(model: MCL, resnet: State, tmp_path: Path) -> None:
    """Each keeps it, and finds it again without a network."""
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(resnet, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    assert is_backbone(taken("torchvision:resnet18", model), resnet)


@pytest.mark.parametrize("source", ["torchvision:resnet19", "torchvision:ResNet50_Weights.V9", "timm:resnet19"])
def test_no_such_model(source: str, model: MCL) -> None:
    library, name = source.split(":")
    with pytest.raises(ConfigError, match=rf"^model\.init: {library} has no weights called '{name}'"):
        taken(source, model)


def test_a_library_that_is_missing(model: MCL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.models", None)
    with pytest.raises(
        ConfigError, match=r"model\.init: timm:resnet18 needs timm \(.*\); install it: pip install timm"
    ):
        taken("timm:resnet18", model)
