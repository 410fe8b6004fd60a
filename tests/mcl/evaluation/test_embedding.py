"""Files of features: the right features in the right rows, also after interruptions and errors."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from dali_pipelines.loader import BadDataError
from dali_pipelines.source import Source, open_source
from mcl import cli, config
from mcl.cli import FEATURES as NAMED
from mcl.config import Config, ConfigError
from mcl.evaluation import embedding
from mcl.evaluation.embedding import FEATURES, EmbeddingError, Projected, embed, read
from mcl.objectives import Objective, build
from mcl.train import checkpoint
from tests.conftest import ROOT, random_view
from tests.mcl.tiny import TINY
from tests.mcl.train.test_checkpoint import small_disk

CPU = torch.device("cpu")
BROKEN = 2


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with 66 photographs, of which number 2 is truncated in its pixels and another in its header."""
    root = tmp_path_factory.mktemp("images")
    for i, file in enumerate(sorted((photos / "train").rglob("*.jpg"))[:66]):
        (root / f"class{i // 33}").mkdir(exist_ok=True)
        shutil.copy(file, root / f"class{i // 33}" / f"{i:02}.jpg")
    for name, size in (("class0/02.jpg", 2000), ("class1/65.jpg", 10)):
        (root / name).write_bytes((root / name).read_bytes()[:size])
    return root


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return open_source(str(folder))


@pytest.fixture(scope="module")
def cfg(folder: Path) -> Config:
    return config.override(config.from_dict(TINY), [f"data.root={folder}", "data.engine=torchvision"])


@pytest.fixture(scope="module")
def model(cfg: Config) -> Objective:
    """A model whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    model = build(cfg)
    model(random_view(cfg.montage, 8, 0), random_view(cfg.montage, 8, 1))
    return model


@pytest.fixture
def thin(cfg: Config, thin_backbone: None) -> Objective:
    torch.manual_seed(0)
    return build(cfg)


def test_rows_are_what_torchvision_computes(cfg: Config, source: Source, model: Objective, tmp_path: Path) -> None:
    """Of the central square of 7/8 of the shorter side, with Pillow and the exported weights of the backbone."""
    made = embed(model.online, cfg, source, CPU, tmp_path / "sub" / "c5.npy", "c5")
    assert [made.names[i] for i in (0, 33)] == ["class0/00.jpg", "class1/33.jpg"]
    assert (made.labels, made.classes) == ([i // 33 for i in range(66)], ["class0", "class1"])
    assert sorted(made.bad) == ["class0/02.jpg", "class1/65.jpg"]
    assert "truncated" in made.bad["class0/02.jpg"]
    rows = made.rows()
    assert (rows.shape, rows.dtype) == ((66, 512), np.float32)
    assert [i for i in range(66) if np.isnan(rows[i]).any()] == [BROKEN, 65]

    resnet = torchvision.models.resnet18(num_classes=1)
    resnet.load_state_dict(model.online.backbone.state_dict(), strict=False)
    resnet.fc = torch.nn.Identity()  # follows the spatial mean
    resnet.eval()
    for i in (0, 40):
        image = Image.open(Path(source.names[i]))
        side = round(7 / 8 * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torchvision.transforms.functional.to_tensor(square)
        pixels = torchvision.transforms.functional.normalize(pixels, cfg.augment.mean, cfg.augment.std)
        with torch.no_grad():
            expected = resnet(pixels[None])[0]
        torch.testing.assert_close(torch.from_numpy(rows[i].copy()), expected, rtol=1e-4, atol=1e-5)


def test_the_projector_is_that_of_whole_images(cfg: Config, model: Objective) -> None:
    view = random_view(cfg.montage, 8, 2)
    encoder = model.online.eval()
    with torch.no_grad():
        expected = encoder(view)[0][0]
        torch.testing.assert_close(Projected(encoder)(view.pixels[: view.canvas_counts[0]]), expected)
    model.train()


def test_features_by_name(cfg: Config, source: Source, thin: Objective, tmp_path: Path) -> None:
    assert tuple(NAMED) == FEATURES
    assert embed(thin.online, cfg, source, CPU, tmp_path / "x.npy", "projector").rows().shape == (66, 16)
    with pytest.raises(ConfigError, match="the model has no p3; maps of its FPN"):
        embed(thin.online, cfg, source, CPU, tmp_path / "p3.npy", "p3")


class Stop(KeyboardInterrupt):
    pass


def stopping_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes loading stop after some steps; returns a list to which the number of skipped steps is added."""
    whole, left_out = embedding.photos, list[int]()

    def photos(*args: Any, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        left_out.append(first)
        for i, batch in enumerate(whole(*args, first=first)):
            if i == batches:
                raise Stop
            yield batch

    monkeypatch.setattr(embedding, "photos", photos)
    return left_out


@pytest.mark.parametrize("kind", [".npy", ".parquet"])
def test_a_stopped_one_goes_on_to_the_same_file(
    cfg: Config, source: Source, thin: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = embed(thin.online, cfg, source, CPU, tmp_path / f"whole{kind}", "c5")
    path = tmp_path / f"stopped{kind}"
    with monkeypatch.context() as patched:
        stopping_after(1, patched)
        with pytest.raises(Stop):
            embed(thin.online, cfg, source, CPU, path, "c5")
    assert not path.exists()
    with monkeypatch.context() as patched:
        left_out = stopping_after(2, patched)
        assert embed(thin.online, cfg, source, CPU, path, "c5").bad == expected.bad
        assert left_out == [1]
        assert path.read_bytes() == expected.path.read_bytes()
        assert not list(tmp_path.glob("*.partial*"))
        assert embed(thin.online, cfg, source, CPU, path, "c5") == read(path)  # already exists
        assert left_out == [1]
        embed(thin.online, cfg, source, CPU, path, "c4")  # other features
        assert left_out == [1, 0]


def test_a_file_of_another_network_is_not_continued(
    cfg: Config, source: Source, thin: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npy"
    with monkeypatch.context() as patched:
        stopping_after(1, patched)
        with pytest.raises(Stop):
            embed(thin.online, cfg, source, CPU, path, "c5")
    torch.nn.init.zeros_(thin.online.backbone.convs[0].weight)
    rows = embed(thin.online, cfg, source, CPU, path, "c5").rows()
    assert np.nanmax(np.abs(rows)) == 0


def test_parquet_has_the_rows_and_their_names(cfg: Config, source: Source, thin: Objective, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    numpy, made = (embed(thin.online, cfg, source, CPU, tmp_path / f"x{kind}", "c5") for kind in embedding.KINDS)
    table = parquet.read_table(made.path).to_pydict()
    assert table["name"] == numpy.names
    assert table["class"] == [f"class{i // 33}" for i in range(66)]
    rows = numpy.rows()
    for i, features in enumerate(table["features"]):
        assert features is None if i in (BROKEN, 65) else features == rows[i].tolist()
    assert np.array_equal(made.rows(), rows, equal_nan=True)
    assert made == read(made.path)
    assert (made.names, made.labels, made.bad) == (numpy.names, numpy.labels, numpy.bad)


def test_wrong_files_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--out: x\.csv: the name must end in \.npy or \.parquet"):
        embedding.check(Path("x.csv"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"Parquet needs pyarrow .*pip install pyarrow, or write to a \.npy file"):
        embedding.check(Path("x.parquet"))


@pytest.mark.fault("a disk without space for the features")
def test_a_full_disk_is_noticed_at_once(
    cfg: Config, source: Source, thin: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npy"
    path.write_text("older")
    stopping_after(0, monkeypatch)
    with small_disk(1000), pytest.raises(EmbeddingError, match=r"x\.npy.*free disk space"):
        embed(thin.online, cfg, source, CPU, path, "c5")
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]
    assert path.read_text() == "older"
    with pytest.raises(EmbeddingError, match=r"x\.npy: cannot be written \(File exists\)"):
        embed(thin.online, cfg, source, CPU, path / "x.npy", "c5")


@pytest.mark.fault("images of which none can be decoded")
def test_images_that_are_all_broken(cfg: Config, folder: Path, thin: Objective, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(folder / "class0" / "02.jpg", tmp_path / "images")
    broken = open_source(str(tmp_path / "images"))
    with pytest.raises(BadDataError, match="1 of the 1 images"):
        embed(thin.online, cfg, broken, CPU, tmp_path / "x.npy", "c5")


def save(cfg: Config, model: Objective, folder: Path) -> Path:
    return checkpoint.save(folder, {"config": config.to_dict(cfg), "step": 1, "model": model.state_dict()}, 1)


def test_the_command(
    cfg: Config, folder: Path, model: Objective, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a list of images and a checkpoint of class folders; the picture and the page are self-contained."""
    (tmp_path / "list.txt").write_text("".join(f"{folder}/class1/{i}.jpg <b>{i % 3}</b>\n" for i in range(40, 52)))
    out = tmp_path / "list.npy"
    arguments = ["embed", save(cfg, model, tmp_path), tmp_path / "list.txt", "--out", out, "--features=p4"]
    cli.main([*map(str, arguments), "--plot", "data.allow_outside=true"])
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        f"{out}: 12 x 16 features, 0 images are bad",
        *(str(out.with_suffix(s)) for s in (".png", ".html")),
    ]
    assert np.load(out).shape == (12, 16)
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["classes"] == ["<b>0</b>", "<b>1</b>", "<b>2</b>"]
    page = out.with_suffix(".html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12 * 9
    assert "&lt;b&gt;0&lt;/b&gt;" in page
    assert not re.search(r"<b>[012]|(src|href)=\"(?!data:)|<script", page)
    assert Image.open(out.with_suffix(".png")).size == (2000, 920)


def test_another_size_than_that_of_a_canvas_schedule(
    cfg: Config, thin: Objective, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows do not depend on a schedule of the run if the command sets the size."""
    rows = []
    for schedule in ("[]", "[[1,1]]"):
        path = save(config.override(cfg, [f"montage.schedule={schedule}"]), thin, tmp_path / schedule)
        out = tmp_path / schedule / "rows.npy"
        cli.main(["embed", str(path), str(folder), "--out", str(out), "montage.cells=2"])
        rows.append(np.load(out))
    assert np.array_equal(*rows, equal_nan=True)


@pytest.mark.soak
@pytest.mark.fault("mcl embed that is killed many times")
def test_killed_again_and_again(cfg: Config, folder: Path, model: Objective, tmp_path: Path) -> None:
    code = (
        "import sys; from mcl import cli; from mcl.evaluation import embedding, features; "
        "embedding.BATCH = features.BATCH = 4; embedding._SAVE = 0; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "embed", str(save(cfg, model, tmp_path)), str(folder), "--out"]
    subprocess.run([*command, str(tmp_path / "whole.npy")], cwd=ROOT, check=True)
    path, state = tmp_path / "killed.npy", tmp_path / "killed.npy.partial.json"
    kills = 0
    for rows in (4, 12, 40):
        process = subprocess.Popen([*command, str(path)], cwd=ROOT)
        while process.poll() is None and not (state.exists() and json.loads(state.read_text())["rows"] >= rows):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run([*command, str(path)], cwd=ROOT, check=True)
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.soak
def test_speed_is_that_of_decoding_and_forward_together(tmp_path: Path) -> None:
    """At least 80% of it, with the demo's network on the photographs of ``make data``; the three take turns."""
    root = ROOT / "data" / "photos4k"
    if not root.exists():
        pytest.skip("make data builds data/photos4k")
    own = config.load("mcl_r18_fpn_demo", [f"data.root={root}", "data.val_root="])
    images, encoder = open_source(str(root)), build(own).online
    network, batches = (
        embedding.Pooled(encoder, "c5").eval(),
        [pixels for pixels, _ in embedding.photos(own, images, CPU)],
    )
    took: dict[str, list[float]] = {"decode": [], "forward": [], "embed": []}
    with torch.no_grad():
        for turn in range(3):
            start = time.perf_counter()
            assert sum(len(index) for _, index in embedding.photos(own, images, CPU)) == len(images)
            decoded = time.perf_counter()
            for pixels in batches:
                network(pixels)
            computed = time.perf_counter()
            embed(encoder, own, images, CPU, tmp_path / f"{turn}.npy", "c5")
            for name, seconds in zip(took, np.diff([start, decoded, computed, time.perf_counter()]), strict=True):
                took[name].append(seconds)
    decode, forward, both = (statistics.median(seconds) for seconds in took.values())
    print(f"{len(images)} images: decode {decode:.1f} s, forward {forward:.1f} s, embed {both:.1f} s")
    assert (decode + forward) / both >= 0.8
