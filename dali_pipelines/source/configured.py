"""The images that a configuration names: those to train on, and held-out ones."""

from tqdm.auto import tqdm

from dali_pipelines.settings import DataConfig
from dali_pipelines.source.index import Progress
from dali_pipelines.source.source import Source, open_source


def open_images(data: DataConfig, held_out: bool = False, progress: Progress | None = None) -> Source:
    """The images of ``data.root``, or of ``data.val_root``; a bar shows how reading their headers gets on.

    Raises:
        SourceError: see :func:`~dali_pipelines.source.source.open_source`.
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
