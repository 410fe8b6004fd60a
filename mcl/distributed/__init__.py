"""Processes of a run: how they meet, what they tell each other, and how their end is noticed."""

from mcl.distributed.group import (
    Gather,
    barrier,
    board,
    calls,
    gather_objects,
    host_group,
    in_turn,
    local_rank,
    local_world_size,
    rank,
    setup,
    teardown,
    world_size,
)
from mcl.distributed.launch import adopt_slurm, tasks_of_srun

__all__ = [
    "Gather",
    "adopt_slurm",
    "barrier",
    "board",
    "calls",
    "gather_objects",
    "host_group",
    "in_turn",
    "local_rank",
    "local_world_size",
    "rank",
    "setup",
    "tasks_of_srun",
    "teardown",
    "world_size",
]
