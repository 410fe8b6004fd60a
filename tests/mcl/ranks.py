"""Processes over gloo on one machine, forked from a server that has imported what they need."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from mcl import distributed


def in_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work` returns in each of `world` processes; it and its arguments are pickled."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mcl.trainer", "dali_pipelines.pipelines"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world, processes) as pool:
        futures = [pool.submit(_join, rank, world, port, work, arguments) for rank in range(world)]
        return [future.result(timeout=60) for future in futures]


def _join(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    distributed.setup("cpu")
    try:
        return work(*arguments)
    finally:
        distributed.teardown()
