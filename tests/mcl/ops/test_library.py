"""Which compiled library is loaded, and the message if none can be loaded."""

from pathlib import Path

import pytest

from mcl.ops.library import load_cuda

BUILD = "pip install --no-build-isolation -e ."


@pytest.mark.parametrize(
    ("files", "cuda", "said"),
    [
        ([], "13.0", f"the extension is not installed; {BUILD} installs it"),
        (["_C.so"], "13.0", f"the extension is built without CUDA; MCL_BUILD_CUDA=1 {BUILD} builds it with CUDA"),
        (["_C.so", "_C_cuda13.so"], "12.8", "the extension supports CUDA 13, PyTorch is built for CUDA 12; install"),
        (["_C.so", "_C_cuda13.so"], None, "the extension supports CUDA 13, PyTorch is built without CUDA; install"),
        (["_C.so", "_C_cuda13.so"], "13.2", "_C_cuda13.so does not load ("),  # the right library, but damaged
        (["_C_cuda12.so", "_C_cuda13.so"], "12.8", "_C_cuda12.so does not load ("),
    ],
)
def test_the_library_for_cuda(files: list[str], cuda: str | None, said: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("not a library")
    assert load_cuda(tmp_path, cuda).startswith(said)
