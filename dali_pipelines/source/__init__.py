"""Sources of images: what images there are, their sizes and classes, and which of them cannot be used.

A source is opened once per run. It reads every image's header (not its pixels), so that crop windows can be planned
from the image's size and most broken images are found before training; the sizes are kept in an index, so that the
next opening reads only what is new. Broken images stay in the numbering: the plan puts substitutes in their places, so
that the order of the others does not depend on them.
"""

from dali_pipelines.source.decoding import decode
from dali_pipelines.source.files import SourceError
from dali_pipelines.source.headers import EXTENSIONS, FORMATS, MAX_PIXELS, Header, read_header
from dali_pipelines.source.index import Progress, index_file
from dali_pipelines.source.source import Kind, Source, indexed_images, open_images, open_source

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "MAX_PIXELS",
    "Header",
    "Kind",
    "Progress",
    "Source",
    "SourceError",
    "decode",
    "index_file",
    "indexed_images",
    "open_images",
    "open_source",
    "read_header",
]
