"""Reads and checks annotation files in COCO format, for training and evaluation."""

import contextlib
import gc
import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dali_pipelines.source import SourceError
from dali_pipelines.source.files import Stamp

Entry = dict[str, Any]

_LARGEST = 1e10  # the largest area for which pycocotools evaluates objects
_MOST_PIXELS = 2**28  # a run length in pycocotools' text encoding has at most six characters
_MOST_OUTLINE = 2**22  # pixels; pycocotools allocates 80 bytes for each


class Annotations(NamedTuple):
    """Content of an annotation file, as MMDetection and pycocotools read it."""

    images: list[Entry]
    categories: list[Entry]
    annotations: list[Entry]
    corrections: str
    """Corrections of the content; empty if there are none."""
    digest: bytes
    """SHA-256 of the file."""


class _Wrong(Exception):
    """The message says what a field must be, or what is wrong with an annotation."""


_kept: dict[tuple[Path, Stamp], tuple[bool, Annotations]] = {}
"""Annotations that were read, and whether masks were required, by file."""


def read(path: Path, masks: bool = True, keep: bool = False) -> Annotations:
    """Reads and checks an annotation file.

    Args:
        path: the file.
        masks: whether every object must have a mask. If False, masks are not checked, and are returned only if an
            earlier call with `keep` has read them.
        keep: whether to keep the result for later calls with the same file, until :func:`forget`.

    Raises:
        SourceError: the file cannot be read, or its content is wrong, see :func:`check`.
    """
    try:
        status = path.stat()
        key = path, (status.st_mtime_ns, status.st_size)
        with_masks, annotations = _kept.get(key, (False, None))
        if annotations is None or masks > with_masks:
            with without_collection():
                annotations = check(path.read_bytes(), str(path), masks)
            if keep:
                _kept[key] = masks, annotations
        return annotations
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None


def forget() -> None:
    """Frees kept annotations, which are 3 GB for COCO."""
    _kept.clear()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Disables Python's garbage collector, which would scan millions of new objects repeatedly."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check(data: bytes, name: str, masks: bool = True) -> Annotations:
    """Checks the content of an annotation file, and makes unambiguous corrections.

    Args:
        data: the content, in UTF-8, UTF-16 or UTF-32.
        name: name of the file, for messages.
        masks: as for :func:`read`.

    Raises:
        SourceError: an entry is missing or wrong; the message names it and a legal value.
    """
    corrections: Counter[str] = Counter()
    content = _load(data, name, corrections)
    images, categories, annotations = (_section(content, name, section, masks, corrections) for section in _FIELDS)
    image_of, category_of = ({str(entry["id"]): entry for entry in entries} for entries in (images, categories))
    _renumber(images, "images", corrections)
    _renumber(categories, "categories", corrections)
    for number, image in enumerate(images):
        for field in _SEARCHED:
            if field in image:
                try:
                    image[field] = [_referred({field: key}, field, category_of)["id"] for key in image[field]]
                except _Wrong as wrong:
                    raise SourceError(f"{name}: {_entry('images', number, image)} {wrong}") from None
    found = []
    for number, annotation in enumerate(annotations):
        try:
            image = _referred(annotation, "image_id", image_of)
            _referred(annotation, "category_id", category_of)
            if min(annotation["bbox"][2:]) == 0:
                corrections["boxes without width or height left out"] += 1  # pycocotools matches no detection with them
                continue
            x, y, width, height = annotation["bbox"]
            _check_bounds("box", (x, y, x + width, y + height), image)
            if masks:
                _check_mask(annotation["segmentation"], image)
        except _Wrong as wrong:
            raise SourceError(f"{name}: {_entry('annotations', number, annotation)} {wrong}") from None
        found.append(annotation)
    if not found:
        raise SourceError(f"{name}: no box has a width and a height; export the annotations again")
    _renumber(found, "annotations", corrections)
    what = ", ".join(f"{what} ({count})" for what, count in corrections.items())
    return Annotations(images, categories, found, what, hashlib.sha256(data).digest())


def _load(data: bytes, name: str, corrections: Counter[str]) -> dict[str, Any]:
    """The object in a file."""
    encoding = json.detect_encoding(data)
    try:
        content = json.loads(data.decode(encoding), parse_constant=str)  # NaN as text, which is no number
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{name}: is not {encoding.upper()} (byte {error.start}); convert it, e.g. by iconv -f latin1 -t utf-8"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({error})" if data else "is empty"
        raise SourceError(f"{name}: {reason}; export the annotations again") from None
    if encoding != "utf-8":
        corrections[f"encoding {encoding}"] += 1
    return content if isinstance(content, dict) else {}


def _section(content: Entry, name: str, section: str, masks: bool, corrections: Counter[str]) -> list[Entry]:
    """Entries of a section, with the fields of the schema and no others."""
    raw_entries = content.get(section)
    if not isinstance(raw_entries, list) or not raw_entries:
        raise SourceError(f"{name}: has no {section}; it must have COCO's images, annotations and categories")
    fields = {field: parse for field, parse in _FIELDS[section].items() if masks or field != "segmentation"}
    entries = []
    for number, raw in enumerate(raw_entries):
        if not isinstance(raw, dict):
            what = f"{_entry(section, number, {})} is {reprlib.repr(raw)}"
            raise SourceError(f"{name}: {what}; it must be an object with {', '.join(fields)}")
        entry: Entry = {}
        for field, parse in fields.items():
            value = raw.get(field)
            if value is None and field in _OPTIONAL:
                continue
            try:
                entry[field] = parse(_default(section, number, field, raw, entry) if value is None else value)
            except _Wrong as wrong:
                what = f"no {field}" if value is None else f"the {field} {reprlib.repr(value)}"
                raise SourceError(f"{name}: {_entry(section, number, entry)} has {what}; it must be {wrong}") from None
            if entry[field] != value or isinstance(value, bool):
                corrections[f"{field} of {section} {'missing' if value is None else 'converted'}"] += 1
        entries.append(entry)
    ids = Counter(str(entry["id"]) for entry in entries)
    if len(ids) < len(entries):
        twice = reprlib.repr(ids.most_common(1)[0][0])
        raise SourceError(f"{name}: two {section} have the same id, {twice}; make them unique")
    return entries


def _entry(section: str, number: int, entry: Entry) -> str:
    """An entry in messages: its position, and its id if that is known."""
    return f"{section}[{number}]" + (f" (id {reprlib.repr(entry['id'])})" if "id" in entry else "")


def _default(section: str, number: int, field: str, raw: Entry, entry: Entry) -> Any:
    """The default of a missing field, or None."""
    if field == "id" and section == "annotations":
        return f"entry {number}"  # to be renumbered: nothing refers to it
    if field == "iscrowd":
        return 0
    if field == "area":
        return entry["bbox"][2] * entry["bbox"][3]
    if field == "file_name" and isinstance(url := raw.get("coco_url"), str):
        return "/".join(url.split("/")[-2:])  # LVIS uses the images in COCO's folders
    return None


def _renumber(entries: list[Entry], section: str, corrections: Counter[str]) -> None:
    """Renumbers entries whose ids pycocotools cannot use: it sorts ids with NumPy, and treats annotation id 0 as "no
    annotation"."""
    ids = [entry["id"] for entry in entries]
    numbers = all(type(key) is int and abs(key) < 2**63 for key in ids)
    texts = all(type(key) is str for key in ids)
    if not (numbers and 0 not in ids if section == "annotations" else numbers or texts):
        corrections[f"ids of {section} renumbered"] += len(entries)
        for number, entry in enumerate(entries, start=1):
            entry["id"] = number


def _referred(annotation: Entry, field: str, entries: dict[str, Entry]) -> Entry:
    """The image or category that an annotation refers to; the reference is replaced by its (possibly new) id."""
    entry = entries.get(str(annotation[field]))
    if entry is None:
        raise _Wrong(
            f"has the {field} {reprlib.repr(annotation[field])}, which the file does not have; add or correct it"
        )
    annotation[field] = entry["id"]
    return entry


def _check_bounds(what: str, corners: tuple[float, float, float, float], image: Entry) -> None:
    """Checks that a box or mask overlaps its image and extends beyond it by no more than the image's size."""
    left, top, right, bottom = corners
    width, height = image["width"], image["height"]
    if left >= width or top >= height or right < 0 or bottom < 0:
        raise _Wrong(f"has a {what} outside of its image of {width} x {height} pixels; correct or remove it")
    if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
        raise _Wrong(f"has a {what} that extends far beyond its image of {width} x {height} pixels; clip it")


def _check_mask(mask: Any, image: Entry) -> None:
    """Checks that pycocotools can draw a mask. pycocotools itself allocates memory for any size without a check."""
    width, height = image["width"], image["height"]
    if width * height > _MOST_PIXELS:
        raise _Wrong(f"has a mask in an image of {width} x {height} pixels; masks may have {_MOST_PIXELS} at most")
    if isinstance(mask, list):
        xs, ys = ([v for polygon in mask for v in polygon[start::2]] for start in (0, 1))
        _check_bounds("mask", (min(xs), min(ys), max(xs), max(ys)), image)
        longest = len(xs) * 3 * max(width, height)
        if longest > _MOST_OUTLINE and sum(map(_distance, xs, xs[1:], ys, ys[1:])) > _MOST_OUTLINE:
            raise _Wrong(f"has a mask with an outline of more than {_MOST_OUTLINE} pixels; simplify it")
        return
    if mask["size"] != [height, width]:
        size = reprlib.repr(mask["size"])
        raise _Wrong(f"has a mask of the size {size}; that of its image is [{height}, {width}]; encode it again")
    counts = mask["counts"]
    pixels = sum(_runs(counts) if isinstance(counts, str) else counts)
    if pixels != width * height:
        raise _Wrong(f"has a mask with run lengths of {pixels} pixels, not {width} x {height}; encode it again")


def _distance(x: float, next_x: float, y: float, next_y: float) -> float:
    return max(abs(x - next_x), abs(y - next_y))


def _runs(text: str) -> list[int]:
    """Decodes run lengths from pycocotools' text.

    Each character has five bits of a number and a flag that says whether more characters follow; the last one also has
    the sign. From the fourth number on, numbers are differences from the run length two before.
    """
    runs: list[int] = []
    value = bits = 0
    for code in map(ord, text):
        digit = code - 48
        if not 0 <= digit < 64 or bits > 25:
            break
        value |= (digit & 31) << bits
        bits += 5
        if digit < 32:
            value -= (digit >> 4) << bits
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = bits = 0
    else:
        if not bits and min(runs, default=0) >= 0:
            return runs
    raise _Wrong(f"has a mask with broken run lengths, {reprlib.repr(text)}; encode it again")


def _id(value: Any) -> int | str:
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return number if type(number) is int else _text(number, "a whole number or text")


def _ids(value: Any) -> list[int | str]:
    if isinstance(value, list):
        return [_id(key) for key in value]
    raise _Wrong("a list of ids of categories")


def _frequency(value: Any) -> str:
    if value in ("r", "c", "f"):
        return str(value)
    raise _Wrong("r, c or f, for rare, common or frequent")


def _text(value: Any, wanted: str = "text", encode: Callable[[str], bytes] = str.encode) -> str:
    if isinstance(value, str) and value and "\0" not in value:
        with contextlib.suppress(UnicodeEncodeError):
            encode(value)
            return value
    raise _Wrong(wanted)


def _file(value: Any) -> str:
    return _text(value, "the path of a file in the folder of the images", os.fsencode)


def _number(value: Any, wanted: str, least: float = -_LARGEST) -> int | float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) in (int, float) and least <= value <= _LARGEST:
        number: int | float = value
        return number
    raise _Wrong(wanted)


def _whole(value: Any, wanted: str, least: int) -> int:
    number = _number(value, wanted, least)
    if number != int(number):
        raise _Wrong(wanted)
    return int(number)


def _side(value: Any) -> int:
    return _whole(value, "a whole number of pixels, at least 1", 1)


def _area(value: Any) -> int | float:
    return _number(value, "a number of pixels, at least 0", 0)


def _flag(value: Any) -> int:
    if value in (0, 1, "0", "1"):
        return int(value)
    raise _Wrong("0 or 1")


def _box(value: Any) -> list[int | float]:
    wanted = "[x, y, width, height] in pixels"
    if not isinstance(value, list) or len(value) != 4:
        raise _Wrong(wanted)
    return [_number(v, wanted, least) for v, least in zip(value, (-_LARGEST, -_LARGEST, 0, 0), strict=True)]


def _mask(value: Any) -> Any:
    """Polygons with at least three points, or the size and run lengths of an encoded mask."""
    wanted = (
        "polygons of three points or more, [[x, y, x, y, ...], ...], or a run-length encoding; "
        "a detector without masks, such as faster_rcnn_r18_fpn_mini or faster_rcnn_r50_fpn_1x, needs none"
    )
    if isinstance(value, list):
        polygons = [_numbers(polygon, wanted) for polygon in value]
        polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        if polygons and not any(len(polygon) % 2 for polygon in polygons):
            return polygons
    elif (
        isinstance(value, dict) and isinstance(value.get("counts"), str | list) and isinstance(value.get("size"), list)
    ):
        counts = value["counts"]
        if not isinstance(counts, str):
            counts = [_whole(count, wanted, 0) for count in counts]
        return {"size": [_whole(side, wanted, 1) for side in value["size"]], "counts": counts}
    raise _Wrong(wanted)


def _numbers(values: Any, wanted: str) -> list[int | float]:
    if not isinstance(values, list):
        raise _Wrong(wanted)
    if {*map(type, values)} <= {int, float}:  # the usual case, and fast
        return values
    return [_number(value, wanted) for value in values]


_FIELDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "images": {
        "id": _id,
        "file_name": _file,
        "width": _side,
        "height": _side,
        "neg_category_ids": _ids,
        "not_exhaustive_category_ids": _ids,
    },
    "categories": {"id": _id, "name": _text, "frequency": _frequency},
    "annotations": {
        "id": _id,
        "image_id": _id,
        "category_id": _id,
        "bbox": _box,
        "area": _area,
        "iscrowd": _flag,
        "ignore": _flag,
        "difficult": _flag,
        "segmentation": _mask,
    },
}
"""By section, all fields that are used, each with a function that checks and converts its value."""

_SEARCHED = "neg_category_ids", "not_exhaustive_category_ids"
_OPTIONAL = "ignore", "difficult", "frequency", *_SEARCHED
"""Fields that may be missing; VOC and LVIS have some of them."""
