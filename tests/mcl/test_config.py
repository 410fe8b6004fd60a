"""Configuration: every key has a type and documentation, and errors name the key."""

import re
from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.geometry import nearest_legal
from mcl import config
from mcl.config import ConfigError, Trait
from mcl.train.optim import learning_rate
from tests.conftest import ROOT

PRESETS = sorted((ROOT / "mcl" / "presets").glob("*.yaml"))


def preset(name: str, *words: str) -> config.Config:
    return config.load(ROOT / "mcl" / "presets" / f"{name}.yaml", words)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_load_and_survive_a_round_trip(path: Path) -> None:
    assert path.read_text().splitlines()[0].endswith(".")  # mcl presets prints the first line
    cfg = config.load(path)
    assert config.from_dict(config.to_dict(cfg)) == cfg


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/you")
    cfg = preset("mcl_r18_fpn_demo", "data.root=~/images", "output=~/runs")
    assert (cfg.data.root, cfg.output) == ("/home/you/images", "/home/you/runs")


def test_every_key_is_documented() -> None:
    undocumented = [key.name for key in config.all_keys() if not key.documentation]
    assert not undocumented


def test_released_preset_is_the_released_configuration() -> None:
    """Compares every number with the authors' configuration file."""
    cfg = preset("mcl_r50_fpn_100e_in1k_released")
    montage, augment, model, optim, trainer = cfg.montage, cfg.augment, cfg.model, cfg.optim, cfg.trainer
    assert (montage.canvas, montage.ratios, montage.canvases(128)) == (224, (1, 2, 4, 8), (128, 32, 8, 4))
    assert montage.tiles(128) == (128, 128, 128, 256)
    assert cfg.data.tile_sampling == "released"
    assert (augment.crop_scale, augment.crop_ratio, augment.flip) == ((0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (augment.jitter, augment.brightness, augment.contrast, augment.saturation, augment.hue) == (
        0.8,
        0.4,
        0.4,
        0.2,
        0.1,
    )
    assert (augment.gray, augment.blur, augment.blur_sigma, augment.solarize) == (
        0.2,
        (1.0, 0.1),
        (0.1, 2.0),
        (0.0, 0.2),
    )
    assert (model.backbone, model.width, model.head_convs, model.hidden) == ("resnet50", 256, 4, 2048)
    assert (model.compute, model.temperature, model.loss_weights) == ("released", 1.0, (0.5, 0.25, 0.125, 0.125))
    assert (optim.name, optim.momentum, optim.weight_decay, optim.trust_coefficient) == ("lars", 0.9, 1e-5, 1e-3)
    assert (optim.exclude, optim.clip_norm, optim.ema, optim.final_lr) == ("released", 500.0, 0.99, 1e-4)
    assert (trainer.epochs, trainer.global_batch, trainer.seed) == (100, 4096, 0)
    assert (trainer.precision, trainer.max_loss_scale, trainer.checkpoint_epochs) == ("fp16", 2.0**14, 4.0)
    steps_per_epoch = 1_281_167 // trainer.global_batch
    assert trainer.epochs * steps_per_epoch == 31_200
    assert round(optim.warmup_epochs * steps_per_epoch) == 3_127
    assert optim.base_lr * trainer.global_batch / 256 == 16.0


def test_matched_preset_differs_from_the_released_one_where_it_says() -> None:
    a, b = preset("mcl_r50_fpn_100e_in1k"), preset("mcl_r50_fpn_100e_in1k_released")
    changed = set(config.changed_keys(a, b))
    assert changed == {"name", "data.tile_sampling", "model.compute", "optim.exclude", "trainer.precision"}


def test_coco_preset_has_the_iterations_of_imagenet() -> None:
    cfg = preset("mcl_r50_fpn_coco")
    steps_per_epoch = 118_287 // cfg.trainer.global_batch
    assert cfg.trainer.epochs * steps_per_epoch == pytest.approx(31_200, abs=steps_per_epoch)
    assert round(cfg.optim.warmup_epochs * steps_per_epoch) == 3_127


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1", r"optim\.lr: no such key; did you mean optim\.base_lr\?"),
        ("trainer.globalbatch=3", r"trainer\.globalbatch: no such key; did you mean trainer\.global_batch\?"),
        ("data.thread=1", r"did you mean data\.threads\?"),
        ("epochs=3", r"epochs: no such key; did you mean trainer\.epochs\?"),
        ("optimiser.name=sgd", r"optimiser\.name: no such key; did you mean optim\.name\?"),
        ("trainer.gpu=8", r"trainer\.gpu: no such key; see `mcl pretrain --help`"),
        ("zzz=1", r"zzz: no such key; see `mcl pretrain --help`"),
        ("trainer.epochs=many", r"trainer\.epochs: .*integer.* \(got 'many'\)"),
        ("trainer.epochs=0", r"trainer\.epochs: .*greater than or equal to 1"),
        ("model.backbone=vgg", r"model\.backbone: .*resnet18.* \(got 'vgg'\)"),
        ("augment.blur=[2, 0]", r"augment\.blur: probabilities must be between 0 and 1"),
        ("augment.crop_scale=[1, 0.2]", r"augment\.crop_scale: .*lower <= upper"),
        ("augment.mean=[1, 2]", r"augment\.mean"),
        ("montage.ratios=[1, 3]", r"montage\.ratios: \[1, 3\] must start with 1 and increase among 1, 2, 4, 8"),
        ("montage.images_per_canvas=[1, 4, 16, 24]", r"montage\.images_per_canvas: 24 must divide the 64 tiles"),
        ("montage.images_per_canvas=[1, 4, 16]", r"montage\.images_per_canvas: 3 entries for 4 ratios"),
        ("montage.schedule=[[0, 5]]", r"montage\.schedule: epochs \[0\] must increase from 1; montage"),
        ("montage.schedule=[[8, 5], [4, 7]]", r"montage\.schedule: epochs \[8, 4\] must increase"),
        ("montage.schedule=[[4, 0]]", r"montage\.schedule: from epoch 4 on: cells: 0 must be at least 1 and"),
        ("montage.schedule=[4, 5]", r"montage\.schedule"),
        ("montage.schedule=[[4, 5.5]]", r"montage\.schedule.*integer"),
        ("model.loss_weights=[1, 1]", r"model\.loss_weights: 2 weights for the 4 levels"),
        ("name=a/b", r"name: 'a/b' is not a plain folder name"),
        ("name=..", r"name: '\.\.' is not a plain folder name"),
        ("name=", r"name: '' is not a plain folder name"),
        ("name=a\0b", r"name: no file can be called 'a\\x00b'"),
        ("data.root=a\0b", r"data\.root: no file can be called"),
        ("output=\ud800", r"output: no file can be called '\\ud800'"),
        ("trainer.global_batch=1000000000000000", r"trainer\.global_batch: .*less than or equal to 1048576"),
        ("montage.cells=1000000000000000", r"montage\.cells: 1000000000000000 must be at least 1 and at most 1024"),
        ("model.head_convs=1000000000", r"model\.head_convs: .*less than or equal to 100"),
        ("model.width=1000000000000000000000", r"model\.width: .*less than or equal to 65536"),
        ("optim.warmup_epochs=1e308", r"optim\.warmup_epochs: .*less than or equal to 1000000"),
        ("trainer.timeout=1e300", r"trainer\.timeout: .*less than or equal"),
        ("name=a\nb", r"name: 'a\\nb' is not a plain folder name"),
        ("trainer.epochs=", r"trainer\.epochs: Input should be a valid integer \(got nothing\)"),
        ("optim.base_lr=inf", r"optim\.base_lr: .*finite"),
        ("optim.base_lr=on", r"optim\.base_lr: .*number.* \(got 'on'\)"),
        ("evaluation.at_end=knn", r"evaluation\.at_end: Input should be a list, such as \[1, 2\] \(got 'knn'\)"),
        ("trainer=3", r"trainer: .*dictionary"),
        ("trainer.epochs", r"expected key=value"),
        ("trainer.epochs=[1", r"trainer\.epochs: cannot read the value"),
        ("name.x=1", r"name\.x: .*"),
    ],
)
def test_errors_name_the_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("mcl_r50_fpn_100e_in1k", word)


def test_a_canvas_schedule_is_written_as_pairs() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", "montage.cells=3", "montage.schedule=[[50,5],[80,7]]")
    assert cfg.montage.schedule == ((50, 5), (80, 7))
    assert [cfg.montage.at(epoch).canvas for epoch in (49, 50, 99)] == [96, 160, 224]
    assert config.from_dict(config.to_dict(cfg)) == cfg


def test_values_are_typed() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", "optim.weight_decay=1e-6", "trainer.epochs=7", "log.wandb=", "data.root=12")
    assert (cfg.optim.weight_decay, cfg.trainer.epochs, cfg.log.wandb, cfg.data.root) == (1e-6, 7, "", "12")


WORDS = (
    *("", " ", "007", "0x10", "1_000", "1e-3", "1e3", ".5", "1:30", "2024-01-01", "nan", "inf", "-inf", "-0", "+1"),
    *("true", "no", "on", "y", "null", "~", "a: b", "[x]", "[1, 2]", "[]", "{}", "'1'", '"1"', " 1 ", "a ", "1.0"),
    *(
        "/data/My set #2",
        "# all",
        "!!python/none",
        "&a",
        "*a",
        "&a [*a]",
        "@",
        "%",
        "|",
        "- 1",
        "a=b",
        "Vögel",
        "鳥",
        "a\nb",
    ),
)
"""Words that are special to YAML, a shell or NumPy."""

KEYS = {key.name: key for key in config.all_keys()}


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.kind is str])
def test_text_is_what_was_typed(name: str) -> None:
    for word in WORDS:
        if name == "name" and not config.is_folder_name(word):
            continue
        cfg = preset("mcl_r50_fpn_100e_in1k", f"{name}={word}")
        path = Trait.PATH in KEYS[name].traits and word == "~"
        assert config.value(cfg, name) == (str(Path.home()) if path else word)
        assert config.from_dict(config.to_dict(cfg)) == cfg


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.kind is not str])
def test_odd_words_for_numbers_switches_choices_and_lists(name: str) -> None:
    """A word is either a value of the key's type, or an error that names the key and the word."""
    numbers: dict[Any, dict[str, float]] = {
        int: {"007": 7, "1_000": 1000, "+1": 1, "-0": 0, "'1'": 1, '"1"': 1, " 1 ": 1, "1.0": 1},
        bool: dict.fromkeys(("true", "on", "y", "'1'", '"1"', " 1 "), True) | {"no": False},
    }
    numbers[float] = numbers[int] | {"1e-3": 1e-3, "1e3": 1000, ".5": 0.5}
    for word in WORDS:
        legal = numbers.get(int if name in ("trainer.devices", "trainer.accumulate") else KEYS[name].kind, {"[]": ()})
        found, problem = attempt(name, word)
        if not problem:
            assert found == legal[word] if word in legal else isinstance(found, tuple), word
        else:
            assert name.split(".")[0] in problem
            assert len(problem.splitlines()) == 1
            if word in legal:  # and out of bounds
                assert re.search("than|at least", problem) or word == "[]", problem


def attempt(name: str, word: str) -> tuple[Any, str]:
    """The value of a key given as this word, and the error."""
    try:
        return config.value(preset("mcl_r50_fpn_100e_in1k", f"{name}={word}"), name), ""
    except ConfigError as error:
        return None, str(error)


def test_none_is_an_empty_value(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("data: {root: , index: null}\nlog:\n  wandb: ~")
    cfg = config.load(file, ["data.val_root="])
    assert (cfg.data.root, cfg.data.index, cfg.data.val_root, cfg.log.wandb) == ("", "", "", "")


def test_files_have_texts_as_they_are_written(tmp_path: Path) -> None:
    """As on the command line; 010 is not read as 8."""
    file = tmp_path / "x.yaml"
    file.write_bytes("\ufeffname: 007\ndata: {root: 1.10}\noutput: no\ntrainer: {epochs: 010, recompute: on}".encode())
    cfg = config.load(file)
    assert (cfg.name, cfg.data.root, cfg.output) == ("007", "1.10", "no")
    assert (cfg.trainer.epochs, cfg.trainer.recompute) == (10, True)
    shared = tmp_path / "shared.yaml"
    shared.write_text("trainer: &t {epochs: 3}\nevaluation: {k: 3}\n")
    assert config.load(shared).trainer.epochs == 3


@pytest.mark.parametrize("word", ["data.root=~/x", "output=~", "model.init=~/a.pt"])
def test_a_tilde_needs_a_home_folder(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as if HOME and passwd gave no home folder
    with pytest.raises(ConfigError, match=rf"{word.split('=')[0]}: ~.*: ~ needs a home folder; set HOME"):
        preset("mcl_r50_fpn_100e_in1k", word)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not a YAML file"),
        ("a: &a {b: *a}", "not a YAML file: .*an alias within its own anchor"),
        ("a: !!int x", "not a YAML file"),
        ("a: !!binary aGk=", "not a YAML file: .*not JSON serializable"),
        ("- 1", "expected keys and values, found list"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        config.load(file)
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.load(file)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_take_fewer_levels(path: Path, levels: int) -> None:
    every = config.load(path)
    keys = "montage.ratios", "montage.images_per_canvas", "montage.queries", "model.loss_weights"
    cfg = config.override(every, {key: list(config.value(every, key)[:levels]) for key in keys})
    images = cfg.images_per_rank(1)
    assert cfg.montage.canvases(images) == every.montage.canvases(images)[:levels]
    assert cfg.plan(2 * images, images).geometry.levels == min(levels, every.montage.levels)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_cause_no_warnings(path: Path) -> None:
    assert config.load(path).doubts() == []


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "in1k",
            ["trainer.epochs=1", "trainer.global_batch=64"],
            r"optim\.warmup_epochs: .* 10\.0225 epochs .* below 0\.0065 instead of reaching 0\.25; set .*epochs=0\.1",
        ),
        (
            "in1k",
            ["trainer.epochs=10", "optim.warmup_epochs=10"],
            r"stays below 4\.2 instead of reaching 16; set optim\.warmup_epochs=1,",
        ),
        ("in1k", ["optim.name=adamw"], r"optim\.base_lr: 1 is a rate for lars.* set optim\.base_lr=0\.001"),
        ("in1k", ["optim.name=sgd"], r"optim\.base_lr: 1 is a rate for lars.* set optim\.base_lr=0\.05"),
        ("in1k", ["optim.base_lr=1e-3"], r"optim\.base_lr: 0\.001 is a rate for adamw or sgd.* set optim\.base_lr=1,"),
        ("in1k", ["optim.final_lr=20"], r"optim\.final_lr: 20 is above the highest learning rate of the run, 16 "),
        ("budget", ["trainer.epochs=50"], r"montage\.schedule: the canvases from epoch 60, 82 on are never used"),
    ],
)
def test_unusual_settings_are_warned_of_in_a_line(name: str, words: list[str], message: str) -> None:
    (line,) = preset(f"mcl_r50_fpn_100e_{name}", *words).doubts()
    assert re.search(message, line), line


def test_a_warm_up_as_long_as_the_run_stays_below_the_stated_rate() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", "trainer.epochs=2", "optim.warmup_epochs=3")
    rates = [learning_rate(cfg.optim, 4096, step, 2000, 1000) for step in range(2000)]
    assert f"stays below {max(rates):.2g} instead of reaching 16" in cfg.doubts()[0]


def test_illegal_batches_name_the_nearest_legal_ones() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k")
    assert cfg.images_per_rank(32) == 128
    with pytest.raises(ConfigError, match=r"4096 is not divisible by 3 processes"):
        cfg.images_per_rank(3)
    odd = config.override(cfg, ["trainer.global_batch=200"])
    with pytest.raises(ConfigError, match=r"200 gives 100 images per process.* nearest legal: 192, 256"):
        odd.images_per_rank(2)
    assert nearest_legal(cfg.montage, 5) == (32,)
    single = config.override(cfg, ["trainer.global_batch=32", "montage.cells=1"])
    with pytest.raises(ConfigError, match=r"one value per channel; double the batch"):
        single.images_per_rank(1)
    later = config.override(cfg, ["trainer.global_batch=32", "montage.schedule=[[5, 1]]"])
    with pytest.raises(ConfigError, match=r"montage\.schedule.* one value per channel; double the batch"):
        later.images_per_rank(1)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ("[3,1,1,1]", r"one in 3 of the 128 canvases of level 0 \(128 images per process\).* nearest legal: 2, 4$"),
        ("[4,1,16,1]", r"one in 16 of the 8 canvases of level 2 .* nearest legal: 8$"),
    ],
)
def test_queries_that_make_no_whole_canvases_name_the_nearest(queries: str, message: str) -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", f"montage.queries={queries}")
    with pytest.raises(ConfigError, match=r"montage\.queries: " + message):
        cfg.images_per_rank(32)


def test_one_query_of_one_cell_is_too_little_for_batchnorm() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", "trainer.global_batch=64", "montage.cells=1")
    assert cfg.images_per_rank(1) == 64
    with pytest.raises(ConfigError, match="BatchNorm has one value per channel"):
        config.override(cfg, ["montage.queries=[1,1,4,1]"]).images_per_rank(1)


def test_one_query_of_level_0_is_too_little_for_the_projector_unless_other_processes_have_more() -> None:
    cfg = preset("mcl_r50_fpn_100e_in1k", "trainer.global_batch=64", "montage.queries=[32,1,1,1]")
    assert cfg.images_per_rank(1) == 64
    with pytest.raises(ConfigError, match=r"montage\.queries: .* a single row; use more queries"):
        config.override(cfg, ["trainer.accumulate=2"]).images_per_rank(1)
    assert config.override(cfg, ["trainer.global_batch=128", "trainer.accumulate=2"]).images_per_rank(2) == 64


@pytest.mark.parametrize("name", ["budget", "budget_2x"])
def test_budget_presets_differ_from_the_usual_one_in_the_montage_alone(name: str) -> None:
    cfg = preset(f"mcl_r50_fpn_100e_{name}")
    changed = set(config.changed_keys(cfg, preset("mcl_r50_fpn_100e_in1k")))
    assert changed == {"name", "montage.cells", "montage.schedule", "montage.queries"}
    assert cfg.montage.final.canvas == 224
    assert cfg.montage.at(cfg.trainer.epochs - 10).canvas == 224


def test_command_line_keys_are_frozen() -> None:
    """Adding or renaming a key is a decision: tests/data/keys.txt must be changed, too."""
    keys = [key.name for key in config.all_keys()]
    assert keys == (ROOT / "tests" / "data" / "keys.txt").read_text().split()


@pytest.mark.parametrize(
    "lines",
    [
        ["x0: &x0 [1, 1]", *(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 12))],
        ["x0: &x0 {name: a}", *(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 10)}]}}" for i in range(1, 12))],
        ["data: &a [*a]"],
        ["data: &a {root: *a}"],
    ],
)
def test_aliases_that_stand_for_too_much(tmp_path: Path, lines: list[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"x\.yaml: not a YAML file: more than 100000 values, or an alias within"):
        config.load(file)


def test_anchors_and_merges(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "trainer: &a {epochs: 3}\noptim: {warmup_epochs: 1}\nlog: {<<: {preview: off}}\nname: &b x\noutput: *b"
    )
    cfg = config.load(file)
    assert (cfg.trainer.epochs, cfg.log.preview, cfg.name, cfg.output) == (3, False, "x", "x")
