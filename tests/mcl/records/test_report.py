"""The report: self-contained, escaped, correct, and written whatever is missing in a run folder."""

import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from mcl.records import report

NAME = "<b>R&D</b>"
RETRIEVAL = {
    "kind": "eval",
    "name": "retrieval",
    "split": "val",
    "gallery": 32,
    "chance": 1 / 32,
    "levels": [0.875, 0.75, 0.5, 0.25],
    "levels_se": [0.01, 0.02, 0.03, 0.04],
    "random": [0.4, 0.3, 0.2, 0.1],
    "random_se": [0.005, 0.005, 0.005, 0.005],
}
KNN = {"kind": "eval", "name": "knn", "split": "val", "accuracy": 0.42, "random": 0.31, "chance": 0.1, "k": 10}


def train_record(step: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 10,
        "loss": 5 - step / 50,
        "lr": 0.1,
        "ema": 0.99,
        "images_per_s": 64.0,
        "data_wait": 0.031,
        "positive": [0.1, 0.2, 0.3, 0.4],
        "negative": [0.0, 0.0, 0.0, 0.0],
    }


def fill(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fill(folder, [train_record(step) for step in range(10, 101, 10)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**RETRIEVAL, "step": 50, "levels": [0.111] * 4}) + "\n")
        file.write(json.dumps({**RETRIEVAL, "step": 100}) + "\n")
        file.write(json.dumps({**KNN, "step": 100, "classes": 7}) + "\n")
        file.write(json.dumps({"kind": "eval", "name": "a<i>", "step": 100, "score": 12.5}) + "\n")
        file.write('{"kind": "train", "st')
    (folder / "config.yaml").write_text(
        f"name: {NAME!r}\nmodel: {{backbone: resnet18}}\nmontage: {{ratios: [1, 2, 4, 8]}}\n"
        "trainer: {epochs: 10, global_batch: 32}\ndata: {root: '/photos/<script>alert(1)</script>'}\n"
    )
    (folder / "bad_files.jsonl").write_text('{"path": "a"}\n{"path": "b"}\n')
    (folder / "preview").mkdir()
    Image.new("RGB", (4, 3), "#123456").save(folder / "preview" / "montage_0.png")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    path = report.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects every element with its attributes, and whether all elements are closed."""

    VOID = ("meta", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"https?://|//www", page)
    elements = Elements(page)
    assert not elements.open
    names = {name for name, _ in elements.found}
    assert not names & {"script", "iframe", "object", "embed"}
    references = [
        value or ""
        for _, attributes in elements.found
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data", "xlink:href")
    ]
    assert references
    assert all(value.startswith(("data:", "#")) for value in references)
    targets = {attributes.get("id") for _, attributes in elements.found}
    assert all(value[1:] in targets for value in references if value.startswith("#"))
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)  # clip paths of the curves


def test_everything_of_the_user_is_escaped(page: str) -> None:
    assert NAME not in page
    assert "<h1>&lt;b&gt;R&amp;D&lt;/b&gt;</h1>" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a<i>" not in page
    assert "a&lt;i&gt;" in page


def test_headline_and_key_figures(page: str) -> None:
    text = text_of(page)
    assert "resnet18 with a feature pyramid · 100 steps, 3,200 images seen · epoch 10 of 10 · 50 s of training" in text
    assert "3.000 final loss 4.800 at the first record" in text
    assert "64.0 images / s" in text
    assert "3.1% waiting for data" in text
    assert "2 bad files" in text
    assert "left out: 1." in text  # the truncated line


def test_evaluations_show_their_last_values_beside_random_weights_and_chance(page: str) -> None:
    rows = [text_of(row) for row in re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL)]
    assert "Level 0 1 × 1 tiles, P5 87.5% ± 1.0 40.0% ± 0.5 3.1%" in rows
    assert "Level 3 8 × 8 tiles, P2 25.0% ± 4.0 10.0% ± 0.5 3.1%" in rows
    assert "Backbone 42.0% 31.0% 10.0%" in rows
    assert "score 12.5" in rows
    assert "11.1%" not in page  # the score of an earlier step
    assert "width:87.5%" in page


def test_curves_are_inline_and_take_the_colours_of_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing
        assert "#010203" not in drawing
        assert "#000000" not in drawing
    loss, cosine, schedules, speed = (re.findall(r"<text[^>]*>(.*?)</text>", d) for d in drawings)
    assert {"loss", "epoch"} <= set(loss)
    assert {"cosine", "level 0", "level 3"} <= set(cosine)
    assert {"learning rate", "EMA momentum"} <= set(schedules)
    assert {"images / s", "data wait, %"} <= set(speed)
    for colour in ("#0072b2", "#e69f00", "#009e73", "#cc79a7"):
        assert colour in drawings[1]
    # The loss falls by the same amount per record: a straight line from the upper left to the lower right.
    path = re.search(r'<path d="M ([^"]+)" clip-path[^>]*style="fill: none; stroke: #0072b2', drawings[0])
    assert path
    points = [tuple(map(float, p.split())) for p in path[1].replace("\n", " ").split("L")]
    assert points[0][0] < points[-1][0]
    assert points[0][1] < points[-1][1]


def test_pictures_are_inside(page: str, folder: Path) -> None:
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data) == (folder / "preview" / "montage_0.png").read_bytes()
    assert 'alt="Montages: every tile has to find its own image in the other view (step 0)"' in page


def test_long_runs_are_thinned_and_odd_records_survive(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [train_record(step) for step in range(1, 2002)]
    records[5] |= {"loss": float("nan"), "positive": None, "images_per_s": "fast", "epoch": None}
    fill(tmp_path, records)
    page = report.write(tmp_path).read_text()
    assert f"<h1>{tmp_path.name}</h1>" in page
    assert ">step<" in page  # an epoch is missing
    assert len(page) < 300_000
    assert "2,001 steps" in text_of(page)
    assert "images ·" not in text_of(page)  # the batch is unknown


@pytest.mark.parametrize("content", ["", "not json\n", '{"kind": "train"}\n[1]\n'])
def test_missing_pieces_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    (tmp_path / "config.yaml").write_text("a: [broken")
    text = text_of(report.write(tmp_path).read_text())
    assert "No training step has been recorded yet." in text
    assert "This run has not been evaluated." in text
    assert "Curves need two." in text
    assert "No pictures in preview/." in text
    assert "a: [broken" in text
    assert ("cannot be read" in text) == bool(content)


@pytest.mark.parametrize("text", ["trainer: [1]", "trainer: {epochs: x}\nmodel: 3\nmontage: {ratios: {a: 1}}", "- 1"])
def test_a_strange_configuration_is_shown(tmp_path: Path, text: str) -> None:
    fill(tmp_path, [train_record(1), train_record(2), {**RETRIEVAL, "step": 2, "levels": ["a"], "random": 3}])
    (tmp_path / "config.yaml").write_text(text)
    assert text.splitlines()[0] in report.write(tmp_path).read_text()


def test_an_empty_folder_has_a_report_and_no_folder_is_an_error(tmp_path: Path) -> None:
    assert "No config.yaml in the run folder." in text_of(report.write(tmp_path).read_text())
    with pytest.raises(report.ReportError, match="no such run folder"):
        report.write(tmp_path / "absent")
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html: cannot write the report"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.7, "1 min 0 s"), (61, "1 min 1 s"), (3661, "1 h 1 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert report.clock(seconds) == words


KNN_OF_100 = {**KNN, "images": 100}
REGIONS = {
    **{"name": "regions", "split": "val", "accuracy": 0.5, "random": 0.4},
    **{"accuracy_interval": [0.48, 0.52], "random_interval": [0.38, 0.42]},
}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([], "Not measured whether it learned: mcl evaluate retrieval run/checkpoints/last.pt"),
        ([{**RETRIEVAL, "step": 0}], "Not measured "),
        ([{**RETRIEVAL, "step": 7, "levels_se": ["a"]}], "Not measured "),
        ([{**KNN, "step": 7}], "Not measured "),  # the number of images is missing
        (
            [{**RETRIEVAL, "step": 9000, "split": "train"}, {**RETRIEVAL, "step": 8000}, {**KNN_OF_100, "step": 9000}],
            "Learned: retrieval (mean over levels) 59.4% ± 2.5 (untrained 25.0% ± 0.5), held-out images, step 8,000",
        ),
        (
            [{**RETRIEVAL, "step": 8}, {**RETRIEVAL, "step": 9, "levels": [0.3, 0.3, 0.3, 0.3]}],
            "No sign of learning: retrieval (mean over levels) 30.0% ± 2.5 (untrained 25.0% ± 0.5), held-out images, ",
        ),
        (  # for example sqrt(0.42 x 0.58 / 100)
            [{**KNN_OF_100, "step": 9}],
            "No sign of learning: nearest neighbours 42.0% ± 4.9 (untrained 31.0% ± 4.6), held-out images, step 9",
        ),
        ([{**REGIONS, "step": 9}], "Learned: objects 50.0% ± 1.0 (untrained 40.0% ± 1.0), held-out images, step 9"),
    ],
)
def test_the_first_line_says_whether_it_learned(scores: list[dict[str, Any]], said: str) -> None:
    assert report.verdict(scores, Path("run")).startswith(said)
    named = report.verdict(scores, Path("run"), "torchvision:resnet50")
    assert ("started from torchvision:resnet50" in named) == (not said.startswith("Not measured"))


def test_what_a_run_was_made_of(folder: Path, tmp_path: Path) -> None:
    """The verdict follows the name; then data set, batch, precision, device and date."""
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text(
        json.dumps({"started": "2026-03-01T12:34:56+00:00", "device": "NVIDIA H200", "world_size": 8, "images": 1234})
    )
    text = text_of(report.render(tmp_path / "run"))
    assert f"{text_of(html.escape(NAME))} Learned: retrieval (mean over levels) 59.4%" in text
    assert "/photos/&lt;script&gt;alert(1)&lt;/script&gt; · 1,234 images · 32 images per step · " in text
    assert " · NVIDIA H200 × 8 · started 2026-03-01 12:34" in text
