"""Runs functions in several processes on one machine, which are forked from a server that has imported what they
need."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from mcl import distributed
from tests.conftest import view


def in_ranks(world: int, work: Callable[..., Any], *arguments: Any, device: str = "cpu") -> list[Any]:
    """Results of `work` in each of `world` processes; `work` and its arguments are pickled.

    Args:
        device: type of the device, which selects the backend, as in :func:`mcl.distributed.setup`.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mcl.train.trainer", "dali_pipelines.pipelines"])
    port = free_port()
    with ProcessPoolExecutor(world, processes) as pool:
        futures = [pool.submit(_join, device, rank, world, port, work, arguments) for rank in range(world)]
        return [future.result(timeout=300) for future in futures]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def joined(geometry: Geometry, views: Sequence[MontageBatch]) -> MontageBatch:
    """One view with the canvases of all ranks' views, ordered by level and then by rank."""
    images = len(views[0].index)
    pixels = zip(*(v.pixels.split(v.canvas_counts) for v in views), strict=True)
    shown = [v.tile_images[v.tiles(i)] + rank * images for i in range(geometry.levels) for rank, v in enumerate(views)]
    canvases = torch.cat([canvases for level in pixels for canvases in level])
    return view(geometry, images * len(views), canvases, torch.cat(shown))


def _join(device: str, rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    distributed.setup(device)
    try:
        return work(*arguments)
    finally:
        distributed.teardown()
