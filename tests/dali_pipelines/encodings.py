"""One picture in every encoding that a folder of images may contain, and how each is handled.

``python -m tests.dali_pipelines.encodings`` writes the table in ``dali_pipelines/README.md``.
"""

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from dali_pipelines import pipelines
from dali_pipelines.source import Source, decode, open_source
from tests.dali_pipelines.images import choose
from tests.dali_pipelines.parity import README

FILES = Path(__file__).parent / "encoded"
"""The same picture in encodings that Pillow cannot write, made by cjpeg of libjpeg-turbo, imagecodecs and tifffile."""

Pixels = npt.NDArray[np.uint8]


def save(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def without_segment(jpeg: bytes, marker: bytes) -> bytes:
    """A JPEG without its first segment of the given kind."""
    start = jpeg.index(b"\xff" + marker)
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with additional chunks after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def png(rows: Iterable[bytes], size: tuple[int, int], depth: int, colour: int, interlaced: bool = False) -> bytes:
    """A PNG of packed rows, without a filter."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def interlaced_rows(pixels: Pixels) -> Iterable[bytes]:
    """Rows of the seven passes of Adam7."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    return [row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]]


def bmp_rle(indices: Pixels, palette: Sequence[int]) -> bytes:
    """A BMP of 8 bits, in which every pixel is a run of length one."""
    rows = [b"".join(b"\1" + bytes([index]) for index in row) + b"\0\0" for row in indices[::-1].tolist()]
    data = b"".join(rows) + b"\0\1"
    colours = b"".join(bytes([b, g, r, 0]) for r, g, b in zip(palette[::3], palette[1::3], palette[2::3], strict=True))
    start = 54 + len(colours)
    info = struct.pack("<IiiHHIIiiII", 40, indices.shape[1], indices.shape[0], 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + colours + data


def encodings(picture: Image.Image) -> dict[str, bytes]:
    """Encoded images of an RGB picture of 64 x 48 pixels, by name."""
    return _jpegs(picture) | _pngs(picture) | _tiffs(picture) | _others(picture)


class Row(NamedTuple):
    """How an encoding is handled."""

    encoding: str
    fate: str
    difference: str
    """Largest difference between the pixels of Pillow and of DALI on a CPU, in 8-bit levels."""


def write(folder: Path, images: dict[str, bytes]) -> Source:
    """Writes images to files, and opens them as a source in this order."""
    for i, image in enumerate(images.values()):
        (folder / f"{i:03}.jpg").write_bytes(image)
    return open_source(str(folder), index=str(folder / "index"))


def rows(source: Source, names: Iterable[str]) -> list[Row]:
    return [Row(name, *_fate(source, i)) for i, name in enumerate(names)]


def _fate(source: Source, i: int) -> tuple[str, str]:
    if i in source.bad:
        return f"replaced: {source.bad[i]}", ""
    try:
        by_pillow = decode(source.read(i)).astype(int)
    except OSError:
        return "replaced when it is decoded", ""
    by_dali = np.array(pipelines.decode_pipeline(source.encoded(i)).run()[0].at(0))
    fate = "decoded by Pillow" if source.by_pillow[i] else "decoded by the engine"
    return fate, str(np.abs(by_pillow - by_dali).max())


def table(rows: Iterable[Row]) -> str:
    head = "| encoding | what happens | difference |\n|---|---|---|\n"
    return head + "".join("| {} | {} | {} |\n".format(*row) for row in rows)


def in_readme() -> re.Match[str]:
    """The table in the README."""
    found = re.search(r"(?<=\n)\| encoding \|(.*\n)+?(?=\n)", README.read_text())
    assert found is not None
    return found


def _file(name: str) -> bytes:
    return (FILES / name).read_bytes()


def _jpegs(picture: Image.Image) -> dict[str, bytes]:
    gray, cmyk, good = picture.convert("L"), picture.convert("CMYK"), {"quality": 92}
    plain = save(picture, "JPEG", **good)
    behind = picture.resize((32, 24))
    return {
        "JPEG": plain,
        "JPEG, progressive": save(picture, "JPEG", progressive=True, **good),
        "JPEG, optimised tables": save(picture, "JPEG", optimize=True, **good),
        "JPEG 4:4:4": save(picture, "JPEG", subsampling="4:4:4", **good),
        "JPEG 4:2:2": save(picture, "JPEG", subsampling="4:2:2", **good),
        "JPEG 4:4:0": _file("440.jpg"),
        "JPEG 4:1:1": _file("411.jpg"),
        "JPEG, restart markers": save(picture, "JPEG", restart_marker_blocks=2, **good),
        "JPEG, arithmetic": _file("arithmetic.jpg"),
        "JPEG, arithmetic, progressive": _file("arithmetic_progressive.jpg"),
        "JPEG, 12 bits": _file("twelve_bits.jpg"),
        "JPEG, lossless": _file("lossless.jpg"),
        "JPEG, gray": save(gray, "JPEG", **good),
        "JPEG, gray, progressive": save(gray, "JPEG", progressive=True, **good),
        "JPEG, RGB": save(picture, "JPEG", keep_rgb=True, **good),
        "JPEG, CMYK": save(cmyk, "JPEG", **good),
        "JPEG, CMYK without Adobe's marker": without_segment(save(cmyk, "JPEG", **good), b"\xee"),
        "JPEG, YCCK": _file("ycck.jpg"),
        "JPEG, YCCK without Adobe's marker": without_segment(_file("ycck.jpg"), b"\xee"),
        **{f"JPEG, EXIF orientation {i}": save(picture, "JPEG", exif=oriented(i), **good) for i in range(1, 9)},
        "JPEG, colour profile of 100 kB": save(picture, "JPEG", icc_profile=bytes(100_000), **good),
        "JPEG, comment": save(picture, "JPEG", comment=b"c" * 60_000, **good),
        "JPEG with a picture behind it (MPO)": save(picture, "MPO", save_all=True, append_images=[behind], **good),
        "JPEG with a larger picture behind it (MPO)": save(
            picture, "MPO", save_all=True, append_images=[picture.resize((128, 96))], **good
        ),
        "JPEG, bytes behind it": plain + b"garbage" * 1000,
        "JPEG, another JPEG behind it": plain + save(behind, "JPEG"),
        "JPEG without the mark of its end": plain[:-2],
        "JPEG, truncated": plain[: len(plain) // 2],
        "JPEG, header only": plain[: plain.index(b"\xff\xda")],
    }


def _pngs(picture: Image.Image) -> dict[str, bytes]:
    plain, gray = save(picture, "PNG"), picture.convert("L")
    pixels, deep = np.asarray(picture), np.asarray(picture).astype(">u2") * 257
    alpha = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1)))
    rgba, gray_alpha = picture.copy(), gray.copy()
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    sixteen = gray.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    two_bits = np.asarray(gray) >> 6
    packed = two_bits[:, ::4] << 6 | two_bits[:, 1::4] << 4 | two_bits[:, 2::4] << 2 | two_bits[:, 3::4]
    size = picture.size
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 2_000_000, zip=True)
    international = PngImagePlugin.PngInfo()
    international.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    plenty = [chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70)]
    deep_alpha = np.dstack([deep, np.asarray(alpha).astype(">u2") * 257])
    return {
        "PNG": plain,
        "PNG, interlaced": png(interlaced_rows(pixels), size, 8, 2, True),
        "PNG, alpha": save(rgba, "PNG"),
        "PNG, alpha, interlaced": png(interlaced_rows(np.asarray(rgba)), size, 8, 6, True),
        "PNG, transparent colour": save(picture, "PNG", transparency=picture.getpixel((3, 3))),
        "PNG, 16 bits": png((row.tobytes() for row in deep), size, 16, 2),
        "PNG, 16 bits, alpha": png((row.tobytes() for row in deep_alpha), size, 16, 6),
        "PNG, gray": save(gray, "PNG"),
        "PNG, gray, transparent level": save(gray, "PNG", transparency=gray.getpixel((3, 3))),
        "PNG, gray, 1 bit": save(picture.convert("1"), "PNG"),
        "PNG, gray, 2 bits": png((row.tobytes() for row in packed), size, 2, 0),
        "PNG, gray, 16 bits": png((row.tobytes() for row in deep[..., 1]), size, 16, 0),
        "PNG, gray, 16 bits, alpha": png((row.tobytes() for row in deep_alpha[..., [1, 3]]), size, 16, 4),
        "PNG, gray and alpha": save(gray_alpha, "PNG"),
        "PNG, palette": save(palette, "PNG"),
        "PNG, palette, 4 bits": save(sixteen, "PNG", bits=4),
        "PNG, palette, transparent colour": save(palette, "PNG", transparency=3),
        "PNG, palette, alpha": save(palette, "PNG", transparency=bytes(range(256))),
        "PNG, EXIF orientation 6": save(picture, "PNG", exif=oriented(6)),
        "PNG, gamma": insert(plain, chunk(b"gAMA", struct.pack(">I", 100_000))),
        "PNG, colour profile": save(picture, "PNG", icc_profile=bytes(2_000_000)),
        "PNG, compressed text of 2 MB": save(picture, "PNG", pnginfo=text),
        "PNG, compressed international text of 2 MB": save(picture, "PNG", pnginfo=international),
        "PNG, texts of 70 MB in all": insert(plain, *plenty),
        "PNG, text of 20 MB": insert(plain, chunk(b"tEXt", b"a\0" + b"b" * 20_000_000)),
        "PNG, broken metadata": insert(plain, chunk(b"pHYs", b"1"), chunk(b"iCCP", b"a\0\7"), chunk(b"zTXt", b"a\0\7")),
        "PNG, bytes behind it": plain + b"garbage",
        "PNG, animated": save(picture, "PNG", save_all=True, append_images=[picture.rotate(90)]),
        "PNG, truncated": plain[: len(plain) // 2],
    }


def _tiffs(picture: Image.Image) -> dict[str, bytes]:
    gray, alpha = picture.convert("L"), Image.linear_gradient("L").resize(picture.size)
    rgba, gray_alpha = picture.copy(), gray.copy()
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    levels = np.asarray(gray)
    white_is_zero = {TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0}
    compressions = ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg", "zstd", "lzma"]
    return {
        "TIFF": save(picture, "TIFF"),
        **{f"TIFF, {name.removeprefix('tiff_')}": save(picture, "TIFF", compression=name) for name in compressions},
        "TIFF, JPEG 2000": _file("jpeg2000.tif"),
        "TIFF, tiles": _file("tiled.tif"),
        "TIFF, planes": _file("planar.tif"),
        "TIFF, big-endian": _file("big_endian.tif"),
        "BigTIFF": save(picture, "TIFF", big_tiff=True),
        **{f"TIFF, orientation {i}": save(picture, "TIFF", tiffinfo={274: i}) for i in range(1, 9)},
        "TIFF, lzw, orientation 6": save(picture, "TIFF", tiffinfo={274: 6}, compression="tiff_lzw"),
        "TIFF, alpha": save(rgba, "TIFF"),
        "TIFF, 16 bits": _file("rgb16.tif"),
        "TIFF, CMYK": save(picture.convert("CMYK"), "TIFF"),
        "TIFF, CIELAB": save(_lab(picture), "TIFF"),
        "TIFF, YCbCr": save(picture.convert("YCbCr"), "TIFF"),
        "TIFF, gray": save(gray, "TIFF"),
        "TIFF, gray, 0 is white": save(gray, "TIFF", tiffinfo=white_is_zero),
        "TIFF, gray and alpha": save(gray_alpha, "TIFF"),
        "TIFF, gray, 16 bits": save(Image.fromarray(levels.astype(np.uint16) * 257), "TIFF"),
        "TIFF, gray, 32 bits": save(Image.fromarray(levels.astype(np.int32)), "TIFF"),
        "TIFF, gray, float from 0 to 1": save(Image.fromarray((levels / 255).astype(np.float32)), "TIFF"),
        "TIFF, gray, float from 0 to 255": save(Image.fromarray(levels.astype(np.float32)), "TIFF"),
        "TIFF, palette": save(picture.convert("P"), "TIFF"),
        "TIFF, 1 bit": save(picture.convert("1"), "TIFF"),
        "TIFF, 1 bit, group4": save(picture.convert("1"), "TIFF", compression="group4"),
        "TIFF, 2 pages": save(picture, "TIFF", save_all=True, append_images=[picture.rotate(90)]),
        "TIFF, truncated": save(picture, "TIFF")[:2000],
    }


def _lab(picture: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture, *profiles, outputMode="LAB") or picture


def _others(picture: Image.Image) -> dict[str, bytes]:
    gray, palette = picture.convert("L"), picture.convert("P", palette=Image.Palette.ADAPTIVE)
    rgba = picture.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(picture.size))
    more: dict[str, Any] = {"save_all": True, "append_images": [picture.rotate(90)]}
    levels = np.asarray(gray)
    size = b"\n%d %d\n" % picture.size
    text = b" ".join(b"%d" % level for level in np.asarray(picture).flat)
    deep = (np.asarray(picture).astype(">u2") * 257).tobytes()
    pam = b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" % picture.size
    return {
        "WebP": save(picture, "WEBP", quality=92),
        "WebP, lossless": save(picture, "WEBP", lossless=True),
        "WebP, alpha": save(rgba, "WEBP", quality=92),
        "WebP, lossless, alpha": save(rgba, "WEBP", lossless=True),
        "WebP, EXIF orientation 6": save(picture, "WEBP", exif=oriented(6), quality=92),
        "WebP, animated": save(picture, "WEBP", **more),
        "WebP, truncated": save(picture, "WEBP", quality=92)[:500],
        "BMP": save(picture, "BMP"),
        "BMP, 32 bits": save(rgba, "BMP"),
        "BMP, 8 bits, gray": save(gray, "BMP"),
        "BMP, 8 bits, palette": save(palette, "BMP"),
        "BMP, 8 bits, run lengths": bmp_rle(np.asarray(palette), palette.getpalette() or []),
        "BMP, 1 bit": save(picture.convert("1"), "BMP"),
        "PPM (P6)": save(picture, "PPM"),
        "PPM, text (P3)": b"P3" + size + b"255\n" + text + b"\n",
        "PPM, 16 bits": b"P6" + size + b"65535\n" + deep,
        "PPM, 100 levels": b"P6" + size + b"99\n" + (np.asarray(picture) * (99 / 255)).astype(np.uint8).tobytes(),
        "PGM (P5)": save(gray, "PPM"),
        "PGM, 16 bits": b"P5" + size + b"65535\n" + (levels.astype(">u2") * 257).tobytes(),
        "PGM, text (P2)": b"P2" + size + b"255\n" + b" ".join(b"%d" % level for level in levels.flat) + b"\n",
        "PBM (P4)": save(picture.convert("1"), "PPM"),
        "PBM, text (P1)": b"P1" + size + b" ".join(b"%d" % (level < 128) for level in levels.flat) + b"\n",
        "PAM (P7)": pam + picture.tobytes(),
        "PFM": b"PF" + size + b"-1.0\n" + (np.asarray(picture)[::-1] / 255).astype("<f4").tobytes(),
        "PFM, gray": b"Pf" + size + b"-1.0\n" + (levels[::-1] / 255).astype("<f4").tobytes(),
        "GIF": save(palette, "GIF"),
        "GIF, animated": save(picture, "GIF", **more),
        "JPEG 2000": save(picture, "JPEG2000"),
        "JPEG 2000, codestream": save(picture, "JPEG2000", no_jp2=True),
        "AVIF": save(picture, "AVIF"),
        "TGA": save(picture, "TGA"),
        "ICO": save(picture, "ICO"),
        "PSD": b"8BPS" + bytes(100),
        "QOI": save(picture, "QOI"),
        "text": b"hello",
        "nothing": b"",
    }


if __name__ == "__main__":
    photos = Path(__file__).parents[2] / "data" / "photos"
    with Image.open(choose(photos)[0]) as photo, tempfile.TemporaryDirectory() as made:
        images = encodings(photo.convert("RGB").resize((64, 48)))
        new = table(rows(write(Path(made), images), images))
    old = in_readme()
    README.write_text(old.string[: old.start()] + new + old.string[old.end() :])
