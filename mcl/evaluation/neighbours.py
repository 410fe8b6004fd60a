"""Shows which images have similar features: a map of all images, and a page of nearest neighbours."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dali_pipelines.reference import decode
from dali_pipelines.source import Source
from dali_pipelines.source.files import replacing
from mcl import __version__
from mcl.config import ConfigError
from mcl.evaluation.embedding import Embedding, EmbeddingError
from mcl.records.preview import pca

QUERIES, NEIGHBOURS = 24, 8

_POINTS = 5000  # maximum number of images on the map, evenly spaced in the source
_GRID = 20, 14  # thumbnails on the map, horizontally and vertically
_COLOURS = 10  # classes that have a colour
_THUMBNAIL = 112  # pixels
_CHUNK = 1 << 14  # rows compared at a time


def check(method: str) -> None:
    """Checks, before features are computed, that a map can be drawn.

    Raises:
        ConfigError: there is no such map, or umap is not installed.
    """
    if method not in ("", "pca", "umap"):
        raise ConfigError(f"--plot: {method!r} is neither pca nor umap")
    if method == "umap":
        _umap()


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise ConfigError(
            f"--plot umap: UMAP is not installed ({error}); pip install umap-learn, or use --plot pca"
        ) from None
    return umap


def draw(embedding: Embedding, source: Source, method: str) -> list[Path]:
    """Writes the map (``.png``) and the page (``.html``) beside a file of features.

    Args:
        source: the source of the embedding's images, for thumbnails.
        method: method of the map, pca or umap.

    Returns:
        The files written.

    Raises:
        ConfigError: there are fewer than two images; or see :func:`check`.
        EmbeddingError: a file cannot be written.
    """
    rows = embedding.rows()
    usable = np.flatnonzero(~np.isnan(rows[:, 0]))
    if len(usable) < 2:
        raise ConfigError(f"--plot: {embedding.root} has {len(usable)} images that can be decoded; a plot needs two")
    picture, page = embedding.path.with_suffix(".png"), embedding.path.with_suffix(".html")
    try:
        with replacing(picture) as file:
            file.write(_map(embedding, rows, source, usable[:: -(-len(usable) // _POINTS)], method))
        with replacing(page) as file:
            file.write(_page(embedding, rows, source, usable).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise EmbeddingError(f"{error.filename or page}: cannot be written ({error.strerror or error})") from error
    return [picture, page]


def _map(
    embedding: Embedding, rows: npt.NDArray[np.float32], source: Source, shown: npt.NDArray[np.int64], method: str
) -> bytes:
    """A PNG that shows images twice: as points coloured by class, and as thumbnails at their positions."""
    unit = F.normalize(torch.from_numpy(rows[shown]), dim=1)
    if method == "pca":
        at = pca(unit.double(), 2).numpy()
    else:
        at = _umap().UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(unit.numpy())
    labels = np.array(embedding.labels)[shown]
    figure = Figure((20, 9.2), layout="constrained", dpi=100)
    points, pictures = figure.subplots(1, 2, sharex=True, sharey=True)
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    named = known[np.argsort(-counts, kind="stable")[:_COLOURS]]
    others = ~np.isin(labels, named)
    name = f"{len(known) - len(named)} other classes" if len(known) > len(named) else "unknown class"
    points.scatter(*at[others].T, s=12, c="#B8BDC4", linewidths=0, label=name if others.any() else None)
    for number, colour in zip(named, mpl.color_sequences["tab10"], strict=False):
        own = at[labels == number]
        points.scatter(*own.T, s=18, color=colour, linewidths=0, label=embedding.classes[number])
    if len(named):
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=12, markerscale=2)
    low, high = at.min(0), at.max(0)
    cell = np.maximum(high - low, 1e-12) / _GRID
    places = np.minimum(((at - low) / cell).astype(int), np.array(_GRID) - 1)
    centres = low + (places + 0.5) * cell
    distances = np.square((at - centres) / cell).sum(1)
    for place in np.unique(places, axis=0):
        inside = np.flatnonzero((places == place).all(1))
        i = inside[distances[inside].argmin()]
        left, bottom = low + place * cell
        extent = (left, left + cell[0], bottom, bottom + cell[1])
        pictures.imshow(_thumbnail(source, int(shown[i])), extent=extent, aspect="auto", interpolation="antialiased")
    what = {"pca": "first two principal components", "umap": "UMAP"}[method]
    points.set_title(
        f"{len(shown):,} images of {embedding.root}, {embedding.features}: {what}", loc="left", fontsize=14
    )
    pictures.set_title("the image nearest to the centre of each cell", loc="left", fontsize=14)
    for axes in (points, pictures):
        axes.set(xlim=(low[0] - cell[0] / 2, high[0] + cell[0] / 2), ylim=(low[1] - cell[1] / 2, high[1] + cell[1] / 2))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#DDDFE2")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def nearest(rows: npt.NDArray[np.float32], queries: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers of the k other rows with the largest cosine to each query, (q, k) each; NaN rows are last."""
    asked = F.normalize(torch.from_numpy(rows[list(queries)]), dim=1)
    best, index = torch.full((len(queries), 0), 0.0), torch.zeros(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), _CHUNK):
        part = F.normalize(torch.from_numpy(np.array(rows[start : start + _CHUNK])), dim=1)
        cosines = (asked @ part.t()).nan_to_num(-torch.inf)
        numbers = torch.arange(start, start + len(part)).expand(len(queries), -1)
        cosines[numbers == torch.tensor(queries)[:, None]] = -torch.inf
        best, index = torch.cat([best, cosines], 1), torch.cat([index, numbers], 1)
        best, chosen = best.topk(min(k, best.shape[1]), 1)
        index = index.gather(1, chosen)
    return best, index


def _page(embedding: Embedding, rows: npt.NDArray[np.float32], source: Source, usable: npt.NDArray[np.int64]) -> str:
    queries = usable[:: -(-len(usable) // QUERIES)].tolist()
    k = min(NEIGHBOURS, len(usable) - 1)
    cosines, index = nearest(rows, queries, k)
    classes = [*embedding.classes, ""]

    def card(i: int, cosine: float | None = None, of: int = -1) -> dict[str, Any]:
        label = embedding.labels[i]
        return {
            "name": embedding.names[i],
            "class": classes[label],
            "cosine": cosine,
            "same": None if cosine is None or -1 in (of, label) else label == of,
            "data": _jpeg(_thumbnail(source, i)),
        }

    found = [
        [card(query), *(card(i, c, embedding.labels[query]) for i, c in zip(own.tolist(), near.tolist(), strict=True))]
        for query, own, near in zip(queries, index, cosines, strict=True)
    ]
    judged = [one["same"] for row in found for one in row if one["same"] is not None]
    known = np.array([label for label in embedding.labels if label >= 0])
    environment = Environment(loader=PackageLoader("mcl"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("neighbours.html").render(
        embedding=embedding,
        rows=found,
        same=sum(judged) / len(judged) if judged else None,
        chance=float(np.square(np.bincount(known) / len(known)).sum()) if len(known) else None,
        version=__version__,
    )


def _thumbnail(source: Source, i: int) -> Image.Image:
    """The central square of an image; gray if the image can no longer be read."""
    try:
        image = Image.fromarray(decode(source, i).permute(1, 2, 0).numpy())
    except OSError:
        return Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "#808080")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
