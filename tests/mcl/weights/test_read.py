"""Checkpoints of other libraries and methods: recognised by names, mapped completely, or refused."""

import pickle
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
from torchvision.models.convnext import CNBlockConfig

from dali_pipelines.geometry import Geometry
from mcl.config import Config, ConfigError, ModelConfig
from mcl.exporters import TARGETS, detectron2, export, mmdet
from mcl.exporters.canonical import canonical_names, part
from mcl.exporters.openselfsup import their_name
from mcl.models import backbones
from mcl.objectives import MCL
from mcl.train.checkpoint import CheckpointError
from mcl.weights.read import Taken, backbone_tensors, read, take
from tests.mcl.exporters.conftest import make_model, save_model
from tests.mcl.exporters.test_backbones import THIN
from tests.mcl.exporters.test_detectron2 import OTHERS, box_head, fpn, match, resnet18
from tests.mcl.exporters.test_libraries import same

State = dict[str, Tensor]
SMALLS = {"swin": "swin_s", "convnext": "convnext_small"}
"""torchvision's names of the deeper models."""


@pytest.fixture(scope="module")
def resnet() -> State:
    """torchvision's model with random weights."""
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
    """Whether only the backbone was loaded, from these tensors by torchvision's names."""
    names = {f"backbone.body.{name}" for name in expected if not name.startswith("fc.")}
    return found.weights.keys() == names and all(
        torch.equal(tensor, expected[name.removeprefix("backbone.body.")]) for name, tensor in found.weights.items()
    )


# ------------------------------------------------------------------------------------------------ round trips


OTHERS_READ = ("resnet50vd", "convnext_t", "swin_t")
SMALL = {"torchvision-detection": "resnet50", "transformers-rtdetr": "resnet18vd"}
SOAK = [
    (to, name) for to, t in TARGETS.items() for name in OTHERS_READ if name in t.backbones and name not in t.renames
]
"""Cases that add little: their names follow the same rules."""
WRITTEN = [
    pytest.param(to, ending, name, marks=[pytest.mark.soak] * ((to, name) in SOAK))
    for to, target in TARGETS.items()
    for ending in target.saves or [""]
    for name in (SMALL.get(to, "resnet18"), *OTHERS_READ)
    if to != "ultralytics-rtdetr" and name in target.backbones
]


def make_thin(patch: pytest.MonkeyPatch) -> None:
    """Makes the models of ``OTHERS_READ`` small."""
    patch.setattr(backbones, "_PATCH_NETS", THIN)
    patch.setitem(backbones._RESNETS, "resnet50", (backbones.Bottleneck, [1, 1, 1, 1]))


@pytest.fixture(scope="module")
def models(
    model: MCL,
    saved: Path,
    resnet50: tuple[MCL, Path],
    resnet18vd: tuple[MCL, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, tuple[MCL, Path]]:
    """Models and their checkpoints, by backbone."""
    with pytest.MonkeyPatch.context() as patch:
        make_thin(patch)
        made = {name: make_model(Geometry(), backbone=name, width=8, head_convs=1) for name in OTHERS_READ}
    others = {name: (m, save_model(m, Geometry(), tmp_path_factory.mktemp(name))) for name, m in made.items()}
    return {"resnet18": (model, saved), "resnet50": resnet50, "resnet18vd": resnet18vd, **others}


@pytest.mark.parametrize(("to", "ending", "name"), WRITTEN)
def test_what_is_written_is_read(
    to: str,
    ending: str,
    name: str,
    models: Mapping[str, tuple[MCL, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every tensor is bit-identical, whether the format is recognised or given."""
    if name in OTHERS_READ:
        make_thin(monkeypatch)
    model, saved = models[name]
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
            f"{source}: backbone 120, fpn 48, head 24 tensors, names as in mcl under {network}"
        )


# ------------------------------------------------------------------------------------------------ others' checkpoints


def under(prefix: str, state: State, scale: float = 1) -> State:
    return {prefix + name: tensor * scale for name, tensor in state.items()}


def children(state: State) -> State:
    """``nn.Sequential`` of a ResNet's children, as in lightly's examples."""
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


FORMS: dict[str, Callable[[State], Any]] = {
    "torchvision": dict,
    "timm": lambda state: {"state_dict": state, "arch": "resnet18", "epoch": 3},
    "mmpretrain": lambda state: {"state_dict": under("backbone.", state), "meta": {"epoch": 100}},
    "MoCo": lambda state: {
        "state_dict": under("module.encoder_q.", state) | under("module.encoder_k.", state, 0),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
    },
    "BYOL of OpenSelfSup": lambda state: {
        "state_dict": {
            **under("online_net.0.", state),
            **{"online_net.1.fc0.weight": torch.ones(2, 2), "head.predictor.fc0.weight": torch.ones(2, 2)},
            **under("target_net.0.", state, 0),
            **under("backbone.", state),
        }
    },
    "DenseCL": lambda state: {
        "state_dict": {
            **{"queue": torch.ones(2, 3), "queue2": torch.ones(2, 3)},
            **under("encoder_q.0.", state),
            **{"encoder_q.1.mlp2.0.weight": torch.ones(2, 2, 1, 1)},
            **under("encoder_k.0.", state, 0),
            **under("backbone.", state),
        }
    },
    "DenseCL, released": lambda state: {"state_dict": state, "author": "DenseCL"},
    "lightly": lambda state: {"state_dict": under("backbone.", children(state))},
    "DINO": lambda state: {"student": under("module.backbone.", state), "teacher": under("backbone.", state, 0)},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    """A ResNet as these methods save it is loaded bit for bit, from the online network."""
    found = taken(save(FORMS[form](resnet)), model)
    assert is_backbone(found, resnet)
    assert found.convention in ("lightly", "mmdet", "torchvision")
    assert (found.convention == "lightly") == (form == "lightly")


def test_conversions_to_detectron2(model: MCL, resnet: State, tmp_path: Path) -> None:
    """As written by MoCo's script: arrays whose names are suffixes of detectron2's."""
    arrays = {
        theirs: tensor.numpy()
        for name, tensor in resnet.items()
        if not name.startswith("fc.") and (theirs := detectron2.rename(f"backbone.body.{name}"))
    }
    content = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    assert is_backbone(
        taken(tmp_path / "x.pkl", model), {name: t for name, t in resnet.items() if "num_batches" not in name}
    )


def thin(library: str, name: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """A library's classifier, and a function that computes its last map."""
    width, depths = THIN[name]
    widths = [width * 2**i for i in range(4)]
    heads = [w // 32 for w in widths]
    if library == "torchvision":
        if name == "swin_t":
            swin = torchvision.models.SwinTransformer([4, 4], width, depths, heads, [7, 7])
            return swin, lambda net, x: net.norm(net.features(x)).permute(0, 3, 1, 2)
        stages = [CNBlockConfig(*s) for s in zip(widths, [*widths[1:], None], depths, strict=True)]
        return torchvision.models.ConvNeXt(stages), lambda net, x: net.features(x)
    if library == "timm":
        if name == "swin_t":
            sizes: dict[str, Any] = {"embed_dim": width, "num_heads": heads}
            return timm.create_model(
                "swin_tiny_patch4_window7_224", depths=depths, **sizes
            ), lambda net, x: net.forward_features(x).permute(0, 3, 1, 2)
        return timm.create_model("convnext_tiny", depths=depths, dims=widths), lambda net, x: net.forward_features(x)
    pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")
    mmdet.import_mmdet()
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier

    swins = {"arch": {"embed_dims": width, "depths": depths, "num_heads": heads}}
    convs = {"arch": {"depths": depths, "channels": widths}, "gap_before_final_norm": False}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        kind = {"type": "SwinTransformer", **swins} if name == "swin_t" else {"type": "ConvNeXt", **convs}
        return ImageClassifier(kind, head={"type": "LinearClsHead", "num_classes": 5, "in_channels": widths[3]}), (
            lambda net, x: net.backbone(x)[-1]
        )


@pytest.mark.parametrize("name", THIN)
@pytest.mark.parametrize("library", ["torchvision", "timm", "mmpretrain"])
def test_classifiers_with_layer_norms(
    library: str, name: str, save: Callable[[Any], Path], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our model computes the last map of a library's model; norms of maps that a classifier does not have are
    unchanged."""
    make_thin(monkeypatch)
    torch.manual_seed(1)
    theirs, last_map = thin(library, name)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    found = taken(save({"state_dict": theirs.state_dict()}), models[name][0])
    ours = backbones.Backbone(name)
    ours.load_state_dict({n.removeprefix("backbone.body."): t for n, t in found.weights.items()}, strict=False)
    last = (library, name) in (("torchvision", "convnext_t"), ("timm", "convnext_t"))
    assert {n.split(".")[3] for n in found.kept} == set("0123" if last else "012")
    assert ("no LayerNorm of C2, C3, C4, C5" if last else "no LayerNorm of C2, C3, C4;") in str(found)
    assert {n.split(".")[0] for n in found.unmapped} <= {"state_dict"}
    assert all("head" in n or "classifier" in n for n in found.unmapped)
    if last:
        ours.set_submodule("norms.3", nn.Identity(), strict=True)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        same([ours.eval()(image)[0]], [last_map(theirs.eval(), image)])


@pytest.mark.parametrize(
    ("to", "name"),
    [
        pytest.param(to, name, marks=[pytest.mark.soak] * ((to, name) not in (("mmdet", "swin"), ("timm", "convnext"))))
        for to in ("torchvision", "timm", "mmdet")
        for name in SMALLS
    ],
)
def test_deeper_models_with_layer_norms(to: str, name: str, save: Callable[[Any], Path]) -> None:
    target = TARGETS[to]
    names = {n: target.name_of(f"backbone.body.{n}", f"{name}_t") for n in state_of(SMALLS[name])}
    state = target.adapt({names[n] or n: tensor for n, tensor in state_of(SMALLS[name]).items()})
    wanted = {n: tensor for n, tensor in backbone_tensors(f"{name}_t").items()}
    with pytest.raises(
        CheckpointError,
        match=rf"x\.pth: has no complete {name}_t, names as in {to}: \d+ unexpected tensors, the first: .*\.[69]\.",
    ):
        take(read(str(save(dict(state))), "x"), wanted, f"{name}_t")


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
    """As saved by its main_moco.py, with both encoders, a queue and an optimiser; here in half precision."""
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
    assert said.startswith(f"{path}: backbone 120 tensors, names as in torchvision under state_dict.module.encoder_q; ")
    assert "no fpn: none of its tensors found; no head: none" in said
    assert "module (125)" in said
    assert not any(tensor.any() for tensor in taken(f"encoder_k:{path}", model).weights.values())


def test_old_checkpoints_have_no_counts(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    old = {name: tensor for name, tensor in resnet.items() if "num_batches" not in name}
    assert is_backbone(taken(save(old), model), old)


def test_the_authors_training_checkpoint(model: MCL, save: Callable[[Any], Path]) -> None:
    """The tests of mcl import-openselfsup compare these names with those of the authors' code."""
    state = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    backbone = {n.replace("encoder_q.0.", "backbone."): t for n, t in state.items() if n.startswith("encoder_q.0.")}
    path = save({"state_dict": backbone | state, "meta": {"epoch": 100}})
    for source, network in ((f"{path}", "online"), (f"encoder_k:{path}", "target")):
        found, expected = taken(source, model), canonical(model, network)
        assert found.convention == "mcl-released"
        assert found.weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())


def test_soco(model: MCL, save: Callable[[Any], Path]) -> None:
    """MMDetection's FPN is called neck, convolutions of the head are numbered from 1, and momentum networks have _k."""
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
    """A Mask R-CNN that loaded our weights by matching suffixes, and was then saved."""
    endings = read(str(export(saved, "detectron2", statistics_of="none", output=tmp_path / "x.pkl").path), "").tensors
    shapes = resnet18("backbone.bottom_up") | fpn((64, 128, 256, 512), 16) | box_head(16)
    found = match({name.removeprefix("model."): () for name in endings if name.startswith("model.")}, shapes)
    state = {name: endings[f"model.{found[name]}"] for name in shapes} | {n: torch.ones(s) for n, s in OTHERS.items()}
    got = taken(save({"model": state, "iteration": 9}), model)
    expected = {name: tensor for name, tensor in canonical(model).items() if "num_batches" not in name}
    assert got.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.weights.items())


def test_a_detector_of_torchvision_without_normalisation_in_its_fpn(save: Callable[[Any], Path]) -> None:
    """Its backbone is loaded, and the report says why its FPN is not."""
    with torch.device("meta"):
        model = MCL(Config(model=ModelConfig(hidden=32, head_convs=0)))
    path = save(state_of("fasterrcnn_resnet50_fpn", weights_backbone=None))
    found = taken(path, model)
    assert {part(name) for name in found.weights} == {"backbone"}
    assert re.search(r"no fpn: 32 of its 40 tensors are missing, the first: backbone\.fpn\.inner_blocks", str(found))
    with pytest.raises(CheckpointError, match=r"x\.pth: has no complete fpn, names as in torchvision-detection: 32 of"):
        taken(path, model, "backbone", "fpn")


def test_parts(model: MCL, saved: Path) -> None:
    assert {part(name) for name in taken(saved, model, "backbone").weights} == {"backbone"}
    assert {part(name) for name in taken(saved, model, "backbone", "head").weights} == {"backbone", "head"}


# ------------------------------------------------------------------------------------------------ refused


def state_of(name: str, **options: Any) -> State:
    """A state of zeros with the model's shapes, stored as a single number."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name, **options).state_dict()
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "resnet34",
            r"no complete resnet18, names as in torchvision: \d+ unexpected tensors, .* layer1\.2.* It is a resnet34",
        ),
        ("resnet50", r"no complete resnet18, .*: \d+ of its 100 tensors are of another shape, .* It is a resnet50"),
        ("wide_resnet50_2", r"no complete resnet18, .*instead of \[64, 64, 3, 3\]\. Its names begin with layer3"),
        ("vit_b_32", r"no tensors of a resnet18, named as in mmdet, .*; its names begin with encoder\.layers \(144\)"),
        ("mobilenet_v3_small", r"no tensors of a resnet18"),
    ],
)
def test_other_networks(name: str, said: str, model: MCL, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pth: (has )?{said}"):
        taken(save(state_of(name)), model)


def test_less_than_the_whole_backbone(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    """A shallower network, one without one of the tensors, and one in which a tensor has another shape."""
    thirty_four = {n.removeprefix("backbone.body."): t for n, t in backbone_tensors("resnet34").items()}
    with pytest.raises(
        CheckpointError, match=r"x\.pth: has no complete resnet34, .* missing, .*layer1\.2\.conv1\.weight"
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
def test_files_without_weights(content: Any, model: MCL, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: has no named tensors"):
        taken(save(content), model)


def test_weights_that_are_not_finite(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: weights are not finite, e\.g\. bn1\.weight"):
        taken(save({**resnet, "bn1.weight": torch.full((64,), torch.nan)}), model)


def test_words_before_a_file(model: MCL, resnet: State, save: Callable[[Any], Path]) -> None:
    path = save({"student": resnet, "teacher": {name: tensor + 1 for name, tensor in resnet.items()}})
    assert is_backbone(taken(f"teacher:{path}", model), {name: tensor + 1 for name, tensor in resnet.items()})
    assert is_backbone(taken(f"torchvision:{path}", model), resnet)
    with pytest.raises(CheckpointError, match="no tensors of a resnet18, named as in detectron2"):
        taken(f"detectron2:{path}", model)
    with pytest.raises(CheckpointError, match="no tensors of a resnet18 under taecher"):
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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # otherwise it retries for 45 seconds


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
    """Each library keeps downloads, and finds them without a network."""
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
