"""Sources of images: names, classes and sizes of images, and which of them cannot be used.

A source is opened once per run. It reads the header of every image, but not its pixels. So crop windows can be planned
from sizes, and most broken images are found before training. Sizes are kept in an index, so that later runs read only
new files. Broken images keep their numbers, and plans replace them, so that the order of the other images does not
depend on them.
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
