"""The images that a configuration names: those to train on, and held-out ones."""

import time
from collections.abc import Iterator

from tqdm.auto import tqdm

from dali_pipelines.source import Progress, Source, index_file, open_source
from mcl import distributed
from mcl.config import ConfigError, DataConfig

_EXAMPLES = 5


def open_images(data: DataConfig, held_out: bool = False, progress: Progress | None = None) -> Source:
    """The images of ``data.root``, or of ``data.val_root``; a bar shows how reading their headers gets on.

    Raises:
        SourceError: see :func:`dali_pipelines.source.open_source`.
    """
    kind = data.source
    if held_out and kind == "coco":  # its annotations would only say which images there are
        kind = "flat"
    with tqdm(disable=None, delay=1, leave=False, unit=" files", desc="reading headers") as bar:

        def show(done: int, of: int, images: int) -> None:
            bar.total = of
            bar.update(done - bar.n)
            if progress is not None:
                progress(done, of, images)

        return open_source(
            data.val_root if held_out else data.root,
            kind,
            key="data.val_root" if held_out else "data.root",
            annotations="" if held_out else data.annotations,
            index=data.index,
            allow_outside=data.allow_outside,
            progress=show,
        )


def open_shared(data: DataConfig) -> Source:
    """The images of ``data.root`` on every process; the first one of each machine brings the index up to date.

    Raises:
        SourceError: see :func:`dali_pipelines.source.open_source`.
        ConfigError: some processes see other images than the rest.
    """
    source = distributed.in_turn(lambda: open_images(data))
    prints = distributed.gather_objects(source.fingerprint())
    strangers = [rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0]]
    if strangers:
        raise ConfigError(
            f"data.root: rank {', '.join(map(str, strangers))} and rank 0 see other images in {data.root} (names, "
            "classes, sizes or broken ones differ); give all machines the same files"
        )
    return source


def make_index(data: DataConfig) -> Iterator[str]:
    """Brings the index up to date; yields what there is to say, in lines.

    Raises:
        SourceError: see :func:`dali_pipelines.source.open_source`.
    """
    yield from _index(data, held_out=False)
    if data.val_root:
        yield from _index(data, held_out=True)


def _index(data: DataConfig, held_out: bool) -> Iterator[str]:
    read = [0]
    start = time.perf_counter()
    source = open_images(data, held_out, lambda done, of, images: read.append(images))
    seconds = time.perf_counter() - start
    classes = f" in {len(source.classes)} classes" if source.classes else ""
    yield f"{source.root}: {len(source)} images{classes}, {len(source.bad)} of them bad ({source.kind})"
    for i, reason in list(source.bad.items())[:_EXAMPLES]:
        yield f"  {source.names[i]}: {reason}"
    yield f"  {read[-1]} headers read in {seconds:.1f} s, {read[-1] / seconds:.0f} per second"
    path = index_file(data.index, source.root, source.kind, "" if held_out else data.annotations)
    yield f"  index: {path if path.exists() else 'could not be written'}"
