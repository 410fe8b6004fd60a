"""The container: hadolint checks docker/Dockerfile in `make check`; its steps run in `make check-wheels`."""

import re

import torch

from tests.conftest import ROOT


def test_cuda_is_that_of_the_pinned_pytorch() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    (version,) = re.findall(r"^ARG CUDA=(\d+\.\d+)", text, re.M)
    assert torch.version.cuda in (None, version)
    assert re.findall(r"^FROM nvidia/cuda:\$\{CUDA\}-(\w+)", text, re.M) == ["devel", "runtime"]


def test_it_is_built_of_what_is_not_ignored() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied[0].split()) == sorted(kept)
