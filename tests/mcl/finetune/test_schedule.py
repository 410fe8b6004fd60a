"""Settings that depend on the number of steps or epochs, and on the type of the optimiser."""

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.optim import LinearLR, build_optim_wrapper
from torch import nn

from mcl.config import ConfigError
from mcl.finetune import settings
from tests.mcl.finetune.conftest import CONFIGS, MINI

ONE_X = CONFIGS / "mask_rcnn_r50_fpn_1x.py"
COSINE = "param_scheduler=[{type: CosineAnnealingLR, T_max: 300, begin: 0, end: 300, by_epoch: false}]"


@pytest.mark.parametrize(
    ("words", "milestones", "warmup"),
    [
        ((), [60_000, 80_000], 1000),
        (("train_cfg.max_iters=500",), [333, 444], 5),  # 333.3, 444.4, 5.6
        (("train_cfg.max_iters=180000",), [120_000, 160_000], 2000),  # those of the 2x configurations
        (("train_cfg.max_iters=20",), [13, 17], 2),  # 13.3, 17.8; not 0.2
        (("train_cfg.max_iters=500", "param_scheduler.1.milestones=[400,450]"), [400, 450], 5),
        (("param_scheduler.0.end=100", "train_cfg.max_iters=500"), [333, 444], 100),
        (("train_cfg.max_iters=500", "param_scheduler.1.milestones.0=100"), [100, 80_000], 5),
    ],
)
def test_milestones_and_warmup_follow_the_steps(words: tuple[str, ...], milestones: list[int], warmup: int) -> None:
    """In proportion to the 90,000 steps of the configuration, rounded down; explicit values do not change."""
    first, second = settings.load(ONE_X, words).param_scheduler
    assert (second.milestones, (first.begin, first.end)) == (milestones, (0, warmup))


def test_a_schedule_that_is_set_as_a_whole_stays() -> None:
    (scheduler,) = settings.load(MINI, [COSINE, "train_cfg.max_iters=300"]).param_scheduler
    assert (scheduler.T_max, scheduler.end) == (300, 300)


def test_the_shortest_warmup_reaches_the_learning_rate() -> None:
    """With MMEngine's own scheduler."""
    config = settings.load(MINI, ["train_cfg.max_iters=6"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    options = {key: value for key, value in config.param_scheduler[0].items() if key != "type"}
    scheduler = LinearLR(optimizer, **options)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * 0.001, 0.1, 0.1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("epochs=0",), r"^epochs: 0 must be a number above 0"),
        (("epochs=many",), r"^epochs: many must be a number above 0"),
        (("epochs=2", "train_cfg.max_iters=10"), r"^epochs: train_cfg\.max_iters is also set"),
        (("optim_wrapper.optimizer.type=AdamW",), r"optimizer\.lr: 0\.06 is a learning rate of SGD; set one of AdamW"),
        (
            ("optim_wrapper.optimizer.type=Adamm", "optim_wrapper.optimizer.lr=1"),
            r"optimizer\.type: no optimiser 'Adamm'; there are SGD, AdamW, LARS",
        ),
        (
            tuple(f"optim_wrapper.optimizer.{word}" for word in ("type=AdamW", "lr=1e-4", "momentum=0.8")),
            r"optimizer\.momentum: AdamW has no such setting",
        ),
    ],
)
def test_wrong_words(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(MINI, words)


def test_another_optimizer() -> None:
    """The momentum of SGD is removed, and the weight decay is kept."""
    config = settings.load(MINI, ["optim_wrapper.optimizer.type=AdamW", "optim_wrapper.optimizer.lr=1e-4"])
    assert dict(config.optim_wrapper.optimizer) == {"type": "AdamW", "lr": 1e-4, "weight_decay": 1e-4}
    wrapper = build_optim_wrapper(nn.Linear(2, 2), config.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW


def test_lars_by_hand() -> None:
    """A weight of norm 5 with a gradient of norm 10: trust 1e-3 * 5 / 10. A bias has none, and moves from 0."""
    words = [f"optim_wrapper.optimizer.{word}" for word in ("type=LARS", "lr=2.0", "weight_decay=0.0")]
    config = settings.load(MINI, words)
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.zero_()
    wrapper = build_optim_wrapper(layer, config.optim_wrapper)
    layer.weight.grad, layer.bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([0.5])
    wrapper.optimizer.step()
    assert layer.weight.tolist()[0] == pytest.approx([3 - 2 * 5e-4 * 6, 4 - 2 * 5e-4 * 8])
    assert layer.bias.item() == -2 * 0.5
