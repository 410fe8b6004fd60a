"""The same graph functions define a CPU pipeline and a GPU pipeline; the latter needs no GPU to be defined."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend, ops

from dali_pipelines import pipelines
from mcl import config
from mcl.config import Config

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "pretrain").glob("*.yaml"))
REGISTERED = {"cpu": ops.cpu_ops(), "gpu": ops.gpu_ops(), "mixed": ops.mixed_ops()}
DECODER = "decoders__Image"


def define(preset: Config, gpu: bool) -> Any:
    """The pipeline of a preset, defined but not built: building for a GPU fails where there is none."""
    pipeline = pipelines.montage_pipeline(
        lambda step: [],
        preset.montage,
        preset.augment,
        preset.data,
        gpu,
        pipelines.inputs(preset.montage),
        batch_size=int(np.lcm.reduce(preset.montage.images_per_canvas)),
        num_threads=1,
        device_id=0 if gpu else None,
    )
    pipeline._build_graph()
    return pipeline


def operators(pipeline: Any) -> Iterator[tuple[str, str, Any]]:
    """(operator, device, its node) in the order of definition."""
    for node in pipeline._ops:
        yield getattr(node._op, "schema_name", type(node._op).__name__), node._op.device, node


def after_the_decoder(pipeline: Any) -> Iterator[tuple[str, str, Any]]:
    """The operators that depend on pixels."""
    pixels: set[int] = set()
    for name, device, node in operators(pipeline):
        if name == DECODER or any(id(edge.source) in pixels for edge in node.inputs):
            pixels.add(id(node))
            if name != DECODER:
                yield name, device, node


@pytest.fixture(scope="module", params=PRESETS, ids=lambda path: path.stem)
def preset(request: pytest.FixtureRequest) -> Config:
    return config.load(request.param)


@pytest.fixture(scope="module")
def gpu(preset: Config) -> Any:
    return define(preset, gpu=True)


def test_there_are_presets() -> None:
    assert len(PRESETS) >= 4


def test_every_operator_exists_on_the_device_it_is_defined_for(gpu: Any) -> None:
    for name, device, _ in operators(gpu):
        assert name in REGISTERED[device], f"{name} has no {device} kernel"


def test_pixels_never_leave_the_gpu(gpu: Any) -> None:
    assert [device for name, device, _ in operators(gpu) if name == DECODER] == ["mixed"]
    found = list(after_the_decoder(gpu))
    assert {device for _, device, _ in found} == {"gpu"}
    names = {name for name, _, _ in found}
    assert {
        "Slice",
        "Resize",
        "Hsv",
        "BrightnessContrast",
        "GaussianBlur",
        "MultiPaste",
        "CropMirrorNormalize",
    } <= names
    assert {output.device for output in gpu._graph_outputs} == {"gpu"}


def test_inputs_lie_where_the_operators_expect_them(gpu: Any) -> None:
    """Pixels on the GPU; parameters, the pivot of contrast among them, on the CPU, to where DALI copies it."""
    for name, device, node in operators(gpu):
        schema = backend.GetSchema(name)
        regular = node.spec.NumRegularInput()
        for i, edge in enumerate(node.inputs):
            expected = schema.GetInputDevice(i, edge.device, device) if i < regular else "cpu"
            actual = "cpu" if expected == "mixed" else expected  # a mixed operator reads from the CPU
            assert edge.device == actual, f"input {i} of {name}"


def test_the_executor_may_copy_from_the_gpu_to_the_cpu(gpu: Any) -> None:
    """The mean gray, a result of the GPU, goes to the CPU as an argument: only the dynamic executor does that."""
    assert gpu.exec_dynamic
    pivots = [edge for name, _, node in operators(gpu) if name == "BrightnessContrast" for edge in node.inputs[1:]]
    back = [edge for edge in pivots if edge.source._op.device == "gpu"]
    assert back
    assert {edge.device for edge in back} == {"cpu"}


def test_a_decoded_image_is_shared_by_all_views(gpu: Any) -> None:
    names = [name for name, _, _ in operators(gpu)]
    assert names.count(DECODER) == 1
    assert names.count("Resize") == names.count("MultiPaste") == 2 * 4


def test_the_cpu_pipeline_consists_of_the_same_operators() -> None:
    preset = config.from_dict(
        {"montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]}, "model": {"loss_weights": [1, 1]}}
    )
    cpu, gpu = define(preset, gpu=False), define(preset, gpu=True)
    assert {device for _, device, _ in operators(cpu)} == {"cpu"}
    assert [name for name, _, _ in operators(cpu)] == [name for name, _, _ in operators(gpu)]
