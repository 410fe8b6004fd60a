"""``model.init``: the weights with which a run starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from dali_pipelines.geometry import Geometry
from mcl import config, distributed
from mcl.config import Config, ConfigError, ModelConfig
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.train.trainer import Trainer
from mcl.weights.start import start
from tests.mcl.exporters.conftest import image, make_model, save_model
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import equal


def test_features_of_torchvision(tmp_path: Path) -> None:
    """In online and target network, weights and running statistics are bit for bit those of torchvision."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet50()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    model = MCL(Config(model=ModelConfig(width=8, head_convs=1, hidden=8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = start(model, str(tmp_path / "resnet50.pth"))
    assert said.startswith(f"{tmp_path / 'resnet50.pth'}: backbone 318 tensors, names as in torchvision; no fpn: none")
    assert said.endswith("; unused: fc (2)")
    layers = {f"layer{i}": str(i) for i in (4, 3, 2, 1)}
    with torch.no_grad():
        expected = create_feature_extractor(theirs.eval(), layers)(image())
        for encoder in (model.online, model.target):
            for level, got in zip("4321", encoder.eval().backbone(image()), strict=True):
                assert float((got - expected[level]).abs().max() / expected[level].abs().max()) < 1e-6
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".backbone." not in name)
    assert all(not parameter.requires_grad for parameter in model.target.parameters())


def test_a_checkpoint_of_the_same_model_is_taken_whole(tmp_path: Path) -> None:
    model = make_model(Geometry(), backbone="resnet18", width=16)
    path = save_model(model, Geometry(), tmp_path)
    other = MCL(model.config)
    assert start(other, str(path)) == f"{path}: all {len(model.state_dict())} tensors of the model"
    assert equal(other.state_dict(), model.state_dict())

    target = MCL(model.config)
    predictors = target.predictors[0][0].weight.clone()
    start(target, f"target:{path}")
    for encoder in (target.online, target.target):
        assert torch.equal(encoder.fpn.laterals[0].conv.weight, model.target.fpn.laterals[0].conv.weight)
    assert torch.equal(target.predictors[0][0].weight, predictors)


def test_only_the_backbone_is_loaded_if_the_width_differs(tmp_path: Path) -> None:
    model = make_model(Geometry(), backbone="resnet18", width=16, head_convs=0)
    path = save_model(model, Geometry(), tmp_path)
    wider = make_model(Geometry(), backbone="resnet18", width=24, head_convs=0)
    said = start(wider, str(path))
    assert "no fpn: 40 of its 40 tensors are of another shape, the first: online." in said
    assert "[16, 512, 1, 1] instead of [24, 512, 1, 1]" in said
    assert equal(wider.online.backbone.state_dict(), model.online.backbone.state_dict())
    assert equal(wider.target.state_dict(), wider.online.state_dict())


def init(cfg: Config, name: str, *words: str) -> Config:
    return config.override(cfg, [f"name={name}", *words])


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def test_a_run_needs_the_file_when_it_starts_and_then_no_more(tiny: Config, resnet: Path) -> None:
    cfg = init(tiny, "started", f"model.init={resnet}", "trainer.epochs=1")
    trainer = Trainer(cfg)
    weights = torch.load(resnet)
    assert torch.equal(trainer.model.online.backbone.conv1.weight, weights["conv1.weight"])
    trainer.save()
    trainer._saver.wait()
    resnet.unlink()
    resumed = Trainer(cfg)
    assert equal(resumed.model.state_dict(), trainer.model.state_dict())
    with pytest.raises(ConfigError, match=r"model\.init: was '.*resnet18\.pth' in the run in .*, is now ''"):
        Trainer(init(cfg, "started", "model.init="))


def test_the_old_key_init_from(tiny: Config, resnet: Path) -> None:
    """Runs that were started with trainer.init_from continue; the key has the effect of model.init."""
    cfg = init(tiny, "old", f"trainer.init_from={resnet}", "trainer.epochs=1")
    Trainer(cfg).fit()
    said = f"initial weights: {resnet}: backbone 120 tensors, names as in torchvision; no fpn"
    assert said in (cfg.run_folder / "train.log").read_text()
    resnet.unlink()
    assert Trainer(cfg).finished
    state = checkpoint.load(cfg.run_folder / "checkpoints" / "last.pt")
    del state["config"]["model"]["init"]  # as earlier versions wrote it
    assert config.from_dict(state["config"]) == cfg
    with pytest.raises(ConfigError, match=r"trainer\.init_from: the old name of model\.init, which is set as well"):
        init(cfg, "both", "model.init=x.pth")


@pytest.mark.parametrize("word", ["nowhere.pth", "torchvision:resnet19", "{tmp}/resnet34.pth"])
def test_nothing_is_written_before_the_weights_are_known_to_fit(word: str, tiny: Config, tmp_path: Path) -> None:
    torch.save({"layer1.2.conv1.weight": torch.ones(64, 64, 3, 3)}, tmp_path / "resnet34.pth")
    cfg = init(tiny, "refused", f"model.init={word.format(tmp=tmp_path)}")
    with pytest.raises((CheckpointError, ConfigError), match="|".join(word.split("/")[-1].split(":"))):
        Trainer(cfg)
    assert not cfg.run_folder.exists()


def weights_of(cfg: Config) -> Any:
    distributed.teardown()  # a trainer joins the group itself
    return Trainer(cfg).model.state_dict()


@pytest.mark.soak
def test_all_processes_start_from_it(tiny: Config, resnet: Path) -> None:
    cfg = init(tiny, "two", f"model.init={resnet}", "trainer.device=cpu", "trainer.global_batch=16")
    one, two = in_ranks(2, weights_of, cfg)
    assert equal(one, two)
    assert torch.equal(one["target.backbone.conv1.weight"], torch.load(resnet)["conv1.weight"])
