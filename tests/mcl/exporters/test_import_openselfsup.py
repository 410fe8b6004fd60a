"""``mcl import-openselfsup``: checkpoints in the format of the authors' training code."""

import copy
import json
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl import config
from mcl.config import Config, ModelConfig
from mcl.exporters.openselfsup import import_file, their_name
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from tests.conftest import ROOT, random_view

REFERENCE = json.loads((ROOT / "tests" / "data" / "step_r18.json").read_text())
RELEASED = ModelConfig(backbone="resnet18", width=64, hidden=128, compute="released")
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> MCL:
    """A model with the reference's shapes, whose target and running statistics are not the initial ones."""
    torch.manual_seed(0)
    model = MCL(Config(model=RELEASED, montage=Geometry(cells=1)))
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.startswith("target.") and tensor.ndim > 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.01)
    return model


@pytest.fixture(scope="module")
def authors(model: MCL) -> dict[str, Tensor]:
    """The model by the names of the authors' code, in which the backbone comes first and is stored twice."""
    own = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    online = {name: own[name] for name in REFERENCE["shapes"]}
    backbone = {n.replace("encoder_q.0.", "backbone."): t for n, t in online.items() if n.startswith("encoder_q.0.")}
    return backbone | online | {name: tensor for name, tensor in own.items() if name.startswith("encoder_k.")}


@pytest.fixture(scope="module")
def hollow(authors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names and shapes, but each tensor repeats one number, so that files are small."""
    states = {name: torch.tensor(float(i)) for i, name in enumerate(authors)}
    states |= {n: states[n.replace("backbone.", "encoder_q.0.")] for n in authors if n.startswith("backbone.")}
    return {name: states[name].to(tensor.dtype).expand(tensor.shape) for name, tensor in authors.items()}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a checkpoint like the authors' runner."""

    def write(state: dict[str, Tensor], meta: dict[str, Any] | None = None, **how: Any) -> Path:
        meta = {"mmcv_version": "1.0.3", "time": "Fri", "epoch": 100, "iter": 31200, "hook_msgs": {}} | (meta or {})
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 16.0, "params": [0]}]}
        path = tmp_path / "epoch_100.pth"
        torch.save({"meta": meta, "state_dict": OrderedDict(state), "optimizer": optimizer}, path, **how)
        return path

    return write


def test_names_are_the_authors(model: MCL) -> None:
    names = {name: their_name(name) for name in model.state_dict()}
    assert {theirs for name, theirs in names.items() if not name.startswith("target.")} == set(REFERENCE["shapes"])
    assert len(set(names.values())) == len(names)
    online = {name: theirs for name, theirs in names.items() if name.startswith("online.")}
    assert all(names[n.replace("online.", "target.")] == t.replace("_q.", "_k.") for n, t in online.items())


def test_imported_model_gives_the_same_loss(model: MCL, authors: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    path = import_file(save(authors), tmp_path / "ours.pt").path
    imported, cfg = checkpoint.load_model(path)
    got_weights = imported.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(got_weights[name], tensor), name
    assert cfg.model == RELEASED
    assert cfg.data.tile_sampling == cfg.optim.exclude == "released"
    query, key = (random_view(Geometry(cells=1), 32, seed) for seed in (1, 2))
    with torch.no_grad():
        expected, got = copy.deepcopy(model)(query, key), imported(query, key)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.losses, expected.losses)


@pytest.mark.parametrize("form", ["released", "ddp", "before torch 1.6", "plain float64"])
def test_all_forms_of_the_file(form: str, hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    if form == "plain float64":
        source = tmp_path / "plain.pth"
        torch.save({name: tensor.double() if tensor.ndim == 1 else tensor for name, tensor in hollow.items()}, source)
    elif form == "ddp":
        source = save({f"module.{name}": tensor for name, tensor in hollow.items()})
    else:
        source = save(hollow, _use_new_zipfile_serialization=form == "released")
    report = import_file(source, tmp_path / "ours.pt")
    content = checkpoint.load(report.path)
    assert content["step"] == 0
    for name, tensor in content["model"].items():
        assert torch.equal(tensor, hollow[their_name(name)])
        assert tensor.dtype == hollow[their_name(name)].dtype

    backbone = sum(name.startswith("backbone.") for name in hollow)
    assert (report.mapped, report.repeated, report.unplaced) == (len(hollow) - backbone, backbone, ())
    assert not report.target_copied
    text = str(report)
    for word in ("resnet18, 4 levels, width 64, 4 head convolutions, hidden 128", "0 left out", "from the file"):
        assert word in text


def test_without_momentum_encoder_the_online_one_is_copied(
    hollow: dict[str, Tensor], save: Save, tmp_path: Path
) -> None:
    source = save({name: tensor for name, tensor in hollow.items() if not name.startswith("encoder_k.")})
    report = import_file(source, tmp_path / "ours.pt")
    weights = checkpoint.load(report.path)["model"]
    assert all(torch.equal(t, weights[n.replace("online.", "target.")]) for n, t in weights.items() if "online." in n)
    assert report.target_copied
    assert "copied from the online network" in str(report)


def test_names_without_place_are_reported(hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    changed = {"backbone.conv1.weight": hollow["backbone.conv1.weight"] + 1}
    extra = {"head.queue": torch.zeros(2), "encoder_q.2.cls_convs.0.conv.bias": torch.zeros(64)}
    report = import_file(save(hollow | changed | extra), tmp_path / "ours.pt")
    assert set(report.unplaced) == {*changed, *extra}
    assert "3 left out" in str(report)
    assert "left out, since mcl has no such tensor: head.queue" in str(report)


def test_fewer_levels(hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    source = save({name: tensor for name, tensor in hollow.items() if "predictor.3" not in name})
    report = import_file(source, tmp_path / "ours.pt")
    cfg = config.from_dict(checkpoint.load(report.path)["config"])
    assert (report.levels, cfg.montage.ratios, cfg.model.loss_weights) == (3, (1, 2, 4), (0.5, 0.25, 0.125))
    finest = [name for name in report.unplaced if "lateral_convs.0" in name or "fpn_convs.0" in name]
    assert set(finest) == set(report.unplaced)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_architecture_is_read_off_the_shapes(name: str, save: Save, tmp_path: Path) -> None:
    wanted = ModelConfig(backbone=name, width=8, hidden=16, head_convs=1, compute="released")  # type: ignore[arg-type]
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in MCL(Config(model=wanted)).state_dict().items() if not n.startswith("target.")}
    state = {their_name(n): torch.zeros(()).expand(shape) for n, shape in shapes.items()}  # stored as one element
    report = import_file(save(state), tmp_path / "ours.pt")
    assert report.model == wanted
    assert config.from_dict(checkpoint.load(report.path)["config"]).model == wanted


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("encoder_q.0.conv1.weight", ""),
        ("encoder_q.1.lateral_convs.3.conv.weight", "encoder_q.1."),  # the neck of another method
        ("encoder_q.2.mlp.0.weight", "encoder_q.2."),
        ("head.predictor.0.mlp.0.weight", "head."),
        ("encoder_q.1.fpn_convs.2.bn.running_var", ""),
        ("encoder_k.0.layer2.0.downsample.0.weight", ""),
        ("head.predictor.2.mlp.1.bias", ""),
    ],
)
def test_missing_tensor_is_named(name: str, also: str, hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    source = save({n: t for n, t in hollow.items() if n != name and not (also and n.startswith(also))})
    with pytest.raises(CheckpointError, match=rf"epoch_100\.pth: has no {name}; a complete training checkpoint"):
        import_file(source, tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


def test_other_architectures_are_refused(hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    deeper = {f"encoder_q.0.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(2, 36)}
    narrow = {"head.predictor.1.mlp.0.weight": torch.zeros(32, 64)}
    five = {"head.predictor.4.mlp.0.weight": torch.zeros(128, 64)}
    for change, message in (
        (deeper, r"encoder_q\.0\.layer3 has 36 blocks, as in none of resnet18, "),
        (narrow, r"head\.predictor\.1\.mlp\.0\.weight has shape \[32, 64\], expected \[128, 64\]"),
        (five, "head.predictor has 5 levels; at most 4"),
    ):
        with pytest.raises(CheckpointError, match=rf"epoch_100\.pth: {message}"):
            import_file(save(hollow | change), tmp_path / "ours.pt")


class Foreign:
    """Represents an object that a training framework stored in its checkpoint."""


@pytest.mark.parametrize(("obstacle", "name"), [(Foreign(), "Foreign"), (deque([1]), r"collections\.deque")])
def test_objects_in_the_file_are_named_and_not_executed(
    obstacle: object, name: str, save: Save, tmp_path: Path
) -> None:
    source = save({}, meta={"hook": obstacle})
    with pytest.raises(
        CheckpointError, match=rf"contains \S*{name} besides .*\n.*python -c .*weights_only=False"
    ) as raised:
        import_file(source, tmp_path / "ours.pt")
    command = str(raised.value).splitlines()[1]
    code = command.split('"')[1]
    compile(code, "command", "exec")
    assert f"'{source}'" in code


def test_command_that_the_error_gives_works(
    hollow: dict[str, Tensor], save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(hollow, meta={"hook": Foreign()})
    with pytest.raises(CheckpointError) as raised:
        import_file(source, tmp_path / "ours.pt")
    monkeypatch.chdir(tmp_path)
    exec(str(raised.value).splitlines()[1].split('"')[1], {})
    assert import_file(tmp_path / "plain.pth", tmp_path / "ours.pt").mapped > 0


def test_unusable_files_are_named(hollow: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    output = tmp_path / "ours.pt"
    source = save(hollow)
    half, text, empty, number = (tmp_path / name for name in ("half.pth", "text.pth", "empty.pth", "number.pth"))
    half.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    text.write_text("<html>not found</html>\n")
    empty.write_bytes(b"")
    torch.save(3, number)
    import_file(source, output)
    for path, message in (
        (tmp_path / "none.pth", "cannot read"),
        (tmp_path, "a folder with 0 "),
        (half, "incomplete, or not"),
        (text, "incomplete, or not in the format"),
        (empty, "incomplete, or not"),
        (number, "has no state_dict"),
        (output, "already a checkpoint of mcl"),
    ):
        with pytest.raises(CheckpointError, match=f"{path.name}: .*{message}"):
            import_file(path, tmp_path / "again.pt")
    with pytest.raises(CheckpointError, match="choose another output"):
        import_file(source, source)


@pytest.mark.parametrize("shape", [(), (0, 3), (2**40, 3)])
@pytest.mark.parametrize("name", ["encoder_q.1.lateral_convs.3.conv.weight", "encoder_q.2.mlp.0.weight"])
def test_shapes_of_no_model(
    hollow: dict[str, Tensor], save: Save, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    source = save(hollow | {name: torch.tensor(0.0).expand(shape)})
    with pytest.raises(CheckpointError, match=r"epoch_100\.pth: .*(its shapes give a width of|has shape)"):
        import_file(source, tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("content", [[1], {"a": 3}, {3: torch.ones(1)}, {"a": torch.ones(1).to_sparse()}, None, {}])
def test_no_weights(tmp_path: Path, content: Any) -> None:
    for state in (content, {"state_dict": content}):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"x\.pth: has no state_dict of tensors"):
            import_file(tmp_path / "x.pth", tmp_path / "ours.pt")
