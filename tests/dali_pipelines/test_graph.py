"""The same functions define a CPU pipeline and a GPU pipeline; defining the latter needs no GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import backend, ops

from dali_pipelines import pipelines
from mcl import config
from mcl.config import Config

PRESETS = sorted((Path(__file__).parents[2] / "mcl" / "presets").glob("*.yaml"))
DECODER = "decoders__Image"
SHAPE = "_Shape"  # reads no pixels, so its device does not matter


def define(preset: Config, engine: str, device: str, gpu: int | None = None) -> Any:
    """The pipeline of a preset, defined but not built, since building for a GPU fails without one."""
    pipelines.load_plugin()
    graph = pipelines.Graph(
        preset.montage,
        preset.augment,
        preset.data,
        device=device,  # type: ignore[arg-type]
        upload=gpu is not None and device == "cpu",
        usual=(4000, 3000),
    )
    pipeline = getattr(pipelines, f"{engine}_pipeline")(
        lambda step: [],
        graph,
        batch_size=int(np.lcm.reduce(preset.montage.images_per_canvas)),
        num_threads=1,
        device_id=gpu,
        exec_dynamic=True,
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
def stock(preset: Config) -> Any:
    return define(preset, "stock", "gpu", gpu=0)


@pytest.fixture(scope="module", params=["stock", "fused"])
def gpu(request: pytest.FixtureRequest, preset: Config, stock: Any) -> Any:
    return stock if request.param == "stock" else define(preset, "fused", "gpu", gpu=0)


def test_there_are_presets() -> None:
    assert len(PRESETS) >= 4


def test_every_operator_exists_on_the_device_it_is_defined_for(gpu: Any) -> None:
    if any(name == "mcl__Montage" for name, _, _ in operators(gpu)) and "gpu" not in pipelines.load_plugin():
        pytest.skip("the plugin was built without CUDA")
    registered = {"cpu": ops.cpu_ops(), "gpu": ops.gpu_ops(), "mixed": ops.mixed_ops()}
    for name, device, _ in operators(gpu):
        assert name in registered[device], f"{name} has no {device} kernel"


def test_pixels_never_leave_the_gpu(gpu: Any) -> None:
    assert [device for name, device, _ in operators(gpu) if name == DECODER] == ["mixed"]
    assert {device for name, device, _ in after_the_decoder(gpu) if name != SHAPE} == {"gpu"}
    assert {node.inputs[0].device for name, _, node in after_the_decoder(gpu) if name == SHAPE} == {"gpu"}
    *canvases, shape = gpu._graph_outputs
    assert {output.device for output in canvases} == {"gpu"}
    assert shape.device == "cpu"


def test_stock_consists_of_what_it_is_meant_to(preset: Config, stock: Any) -> None:
    names = [name for name, _, _ in operators(stock)]
    pixels = {name for name, _, _ in after_the_decoder(stock)}
    assert {"Slice", "Resize", "Hsv", "BrightnessContrast", "GaussianBlur"} <= pixels
    assert names.count(DECODER) == 1  # all views share the decoded image
    assert names.count("Resize") == names.count("CropMirrorNormalize") == 2 * preset.montage.levels


def test_fused_is_one_operator(preset: Config) -> None:
    found = [(name, device) for name, device, _ in operators(define(preset, "fused", "gpu", gpu=0))]
    assert [f for f in found if f[1] != "cpu"] == [(DECODER, "mixed"), ("mcl__Montage", "gpu")]


def test_no_image_is_decoded_before_its_header_has_been_read(gpu: Any) -> None:
    """DALI's decoder crashes on some images whose header it cannot read."""
    depends: set[int] = set()
    for name, _, node in operators(gpu):
        if name == "PeekImageShape" or any(id(edge.source) in depends for edge in node.inputs):
            depends.add(id(node))
        if name == DECODER:
            assert id(node) in depends


def test_inputs_lie_where_the_operators_expect_them(gpu: Any) -> None:
    """Pixels are on the GPU. Parameters, including the pivot of contrast, which DALI copies, are on the CPU."""
    for name, device, node in operators(gpu):
        schema = backend.GetSchema(name)
        regular = node.spec.NumRegularInput()
        for i, edge in enumerate(node.inputs):
            expected = schema.GetInputDevice(i, edge.device, device) if i < regular else "cpu"
            actual = "cpu" if expected == "mixed" else expected  # a mixed operator reads from the CPU
            assert edge.device == actual, f"input {i} of {name}"


def test_the_executor_may_copy_from_the_gpu_to_the_cpu(stock: Any) -> None:
    """The mean gray is computed on the GPU and used as a CPU argument, which only the dynamic executor allows."""
    assert stock.exec_dynamic
    pivots = [edge for name, _, node in operators(stock) if name == "BrightnessContrast" for edge in node.inputs[1:]]
    back = [edge for edge in pivots if edge.source._op.device == "gpu"]
    assert back
    assert {edge.device for edge in back} == {"cpu"}


def test_the_decoder_sets_memory_aside_and_shares_the_work(preset: Config) -> None:
    """Memory is allocated in advance, so that it does not grow with larger images; hardware_decoder sets the decoder's
    share."""
    chosen = config.override(preset, ["data.hardware_decoder=0.12"])
    (node,) = (node for name, _, node in operators(define(chosen, "fused", "gpu", gpu=0)) if name == DECODER)
    expected = {"preallocate_width_hint": 4000, "preallocate_height_hint": 3000, "hw_decoder_load": 0.12}
    assert expected.items() <= node._op._init_args.items()


@pytest.mark.parametrize("engine", ["stock", "fused"])
def test_the_cpu_pipeline_consists_of_the_same_operators(engine: str) -> None:
    preset = config.from_dict(
        {"montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]}, "model": {"loss_weights": [1, 1]}}
    )
    cpu, gpu = define(preset, engine, "cpu"), define(preset, engine, "gpu", gpu=0)
    assert {device for _, device, _ in operators(cpu)} == {"cpu"}
    assert [name for name, _, _ in operators(cpu)] == [name for name, _, _ in operators(gpu)]


@pytest.mark.parametrize("engine", ["stock", "fused"])
def test_canvases_made_on_the_cpu_are_uploaded_where_the_network_is_on_a_gpu(engine: str) -> None:
    preset = config.from_dict({})
    pipeline = define(preset, engine, "cpu", gpu=0)
    *canvases, shape = pipeline._graph_outputs
    assert {output.device for output in canvases} == {"gpu"}
    assert shape.device == "cpu"
    assert [device for name, device, _ in operators(pipeline) if name == DECODER] == ["cpu"]
