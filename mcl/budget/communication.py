"""Communication of several processes in a step, and the time that it takes.

Calls and bytes are counted, so they are those of a real step. Times are estimates under these assumptions:

* A GPU computes at the rate that one GPU reaches in the cited supervised training
  (:data:`~mcl.budget.hardware.YARDSTICKS`).
* An all-reduce costs the latency of its hops and its bytes over the slowest link, along a ring or a tree, whichever is
  faster, as NCCL chooses; an all-gather uses a ring. A ring takes 2 (W - 1) hops for an all-reduce and W - 1 for an
  all-gather, and sends (W - 1) / W of the result per pass. Links reach their full rate, which is more than is measured.
* Gradients are sent during the backward pass, except the last bucket, which is complete at its end. Targets are sent
  during the forward pass of the online network. Every call of BatchNorm waits for its statistics.
* All processes are ready at the same moment.
* Signals are exchanged between hosts while the next steps run, at no cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from mcl.budget.count import Count, Stage
from mcl.budget.hardware import NODE, yardsticks
from mcl.config import ConfigError

_BUCKETS = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # type: ignore[attr-defined]

LATENCY_SOURCE = "NVIDIA/nccl src/graph/tuning.cc: protocol LL over NVLink (times 1.8 between nodes) and network"
_BASE = {"ring": 3.6e-6, "tree": 4.4e-6}  # seconds per call
_HOP = {"ring": 0.47e-6, "tree": 0.52e-6}  # seconds, within a node
_HOP_BETWEEN = {"ring": 2.7e-6, "tree": 5.0e-6}  # seconds, from node to node
_SHARED = 1.8  # factor of hops within a node if there are several nodes


@dataclass(frozen=True)
class Exchange:
    """The collectives of a step for one purpose."""

    purpose: str
    operation: str  # all-reduce or all-gather
    sizes: Sequence[int]  # bytes of one process's input to each call, in the order of calls


@dataclass(frozen=True)
class Links:
    """Bandwidth between GPUs in one direction, GB/s (10^9 bytes)."""

    hardware: str
    within_gb_per_s: float  # from one GPU to the others of its node
    between_gb_per_s: float  # from one node to the others, over all its adapters
    source: str


LINKS = (
    Links("A100", 300, 200, "DGX A100 data sheet: NVLink 600 GB/s in both directions, 8 adapters of 200 Gb/s"),
    Links("H100", 450, 400, "DGX H100 data sheet: NVLink 900 GB/s in both directions, 8 adapters of 400 Gb/s"),
    Links("V100", 150, 50, "DGX-1 (V100) data sheet: NVLink 300 GB/s in both directions, 4 adapters of 100 Gb/s"),
)


def exchanges(count: Count, accumulate: int) -> list[Exchange]:
    """Collectives of a step, which are the same for any number of processes above one.

    Args:
        count: counts of a micro-batch.
        accumulate: number of micro-batches in a step.
    """
    # Per group: mean, squared distances and number of rows; then the two sums of the gradient.
    forward = [n.element * n.groups * (2 * n.channels + 1) for n in count.norms]
    backward = [n.element * n.groups * 2 * n.channels for n in count.norms if n.returns]
    return [
        Exchange("targets", "all-gather", [size * accumulate for size in count.gathered]),
        Exchange("BatchNorm forward", "all-gather", forward * accumulate),
        Exchange("BatchNorm backward", "all-reduce", backward * accumulate),
        Exchange("gradients", "all-reduce", buckets(count.gradients)),
        Exchange("signals", "all-reduce", [8]),  # between hosts, see mcl.distributed.consensus
    ]


def buckets(gradients: Sequence[int]) -> list[int]:
    """Bytes of the buckets into which DistributedDataParallel puts gradients, from the second step on.

    Args:
        gradients: bytes of each, in the order in which backward computes them.
    """
    tensors = [torch.empty(size, dtype=torch.uint8, device="meta") for size in gradients]
    assigned, _ = dist._compute_bucket_assignment_by_size(tensors, _BUCKETS)  # type: ignore[attr-defined]
    return [sum(gradients[i] for i in bucket) for bucket in assigned]


def nodes_of(gpus: int, nodes: int | None) -> int:
    """Number of machines: the requested number, or the smallest with at most NODE GPUs each.

    Raises:
        ConfigError: the GPUs cannot be divided among them.
    """
    if nodes is None:
        return next(n for n in range(math.ceil(gpus / NODE), gpus + 1) if gpus % n == 0)
    if nodes < 1 or gpus % nodes:
        raise ConfigError(f"--nodes: {gpus} GPUs cannot be divided among {nodes} nodes")
    return nodes


def links_of(bandwidth: Sequence[float] | None) -> Sequence[Links]:
    """Published bandwidths, or the given ones for any hardware.

    Raises:
        ConfigError: they are not two positive numbers.
    """
    if bandwidth is None:
        return LINKS
    if len(bandwidth) != 2 or not all(0 < rate < math.inf for rate in bandwidth):
        raise ConfigError("--bandwidth: give two positive numbers, GB/s within a node and between nodes, e.g. 230,160")
    within, between = bandwidth
    return [Links(links.hardware, within, between, "--bandwidth") for links in LINKS]


def describe(
    stages: Sequence[Stage], supervised: float, precision: str, gpus: int, nodes: int, links: Sequence[Links]
) -> dict[str, Any]:
    """The entry ``communication`` of a budget; see :mod:`mcl.budget.cost`.

    Args:
        stages: stages of the configuration with `gpus` processes.
        supervised: FLOPs per image of a supervised ResNet-50 step at 224 px.
        precision: value of ``trainer.precision``; without published throughputs for it, ``scales`` is empty.
        gpus: number of processes, one per GPU.
        nodes: number of machines.
        links: bandwidths to estimate with.
    """
    said: dict[str, Any] = {
        "nodes": nodes,
        "per_step": [],
        "links": [asdict(k) for k in links],
        "latency": LATENCY_SOURCE,
        "scales": [],
    }
    if gpus == 1:
        return said
    for e in exchanges(stages[-1].count, stages[-1].accumulate):
        if not e.sizes:
            continue
        sizes = {"calls": len(e.sizes), "bytes": sum(e.sizes)}
        said["per_step"].append({"purpose": e.purpose, "operation": e.operation, **sizes})
    rates = {y.hardware: y.one * supervised for y in yardsticks(precision)}
    doubling = [*(1 << i for i in range(nodes.bit_length()) if 1 << i < nodes), nodes]
    said["scales"] = [
        _scale(stages, rates[k.hardware], gpus, gpus // nodes * n, n, k)
        for k in links
        for n in doubling
        if k.hardware in rates
    ]
    return said


def _scale(stages: Sequence[Stage], rate: float, gpus: int, world: int, nodes: int, links: Links) -> dict[str, Any]:
    """Estimates for a mean step with the same number of images per GPU; `rate` is FLOP/s of a GPU."""
    epochs = sum(stage.epochs for stage in stages)
    steps = [(step_times(stage, rate, world / gpus, world, nodes, links), stage.epochs / epochs) for stage in stages]
    means = {name: sum(seconds[name] * share for seconds, share in steps) for name in steps[0][0]}
    return {
        "hardware": links.hardware,
        "gpus": world,
        "nodes": nodes,
        "global_batch": world * stages[0].images * stages[0].accumulate,
        **means,
        "efficiency": means["compute_s"] / (means["compute_s"] + means["exposed_s"]),
    }


def step_times(stage: Stage, rate: float, share: float, world: int, nodes: int, links: Links) -> dict[str, float]:
    """Seconds of a step's arithmetic, of its communication, and of the communication that is not overlapped.

    Args:
        stage: stage of the configuration.
        rate: FLOP/s of a GPU.
        share: `world` as a fraction of the processes that the stage was counted for; the FLOPs of the loss are
            proportional to it, since it compares with the targets of all processes.
        world: number of processes, one per GPU.
        nodes: number of machines.
        links: bandwidths between GPUs.
    """

    def time(flops: Mapping[str, int]) -> float:
        """Seconds of one micro-batch."""
        return sum(value * (share if part == "loss" else 1) for part, value in flops.items()) / rate

    forward, backward = time(stage.count.forward), time(stage.count.backward)
    online = time({part: value for part, value in stage.count.forward.items() if part != "momentum network"})
    took = {
        e.purpose: [collective_time(e.operation, size, world, nodes, links) for size in e.sizes]
        for e in exchanges(stage.count, stage.accumulate)
    }
    norms = sum(took["BatchNorm forward"]) + sum(took["BatchNorm backward"])
    targets, gradients = sum(took["targets"]), sum(took["gradients"])
    # Gradients are sent only during the backward pass of the last micro-batch.
    late = max(took["gradients"][-1], gradients - backward)
    return {
        "compute_s": stage.accumulate * (forward + backward),
        "gradients_s": gradients,
        "targets_s": targets,
        "batchnorm_s": norms,
        "exposed_s": norms + max(0.0, targets - stage.accumulate * online) + late,
    }


def collective_time(operation: str, size: int, world: int, nodes: int, links: Links) -> float:
    """Seconds of an all-reduce or all-gather of `size` bytes per process."""
    within, between = links.within_gb_per_s, links.between_gb_per_s
    bandwidth = 1e9 * (within if nodes == 1 else min(within, between))
    passes = 2 if operation == "all-reduce" else 1
    sent = size * (passes * (world - 1) / world if operation == "all-reduce" else world - 1)
    ring = _latency("ring", passes * (world - nodes), passes * (nodes - 1), nodes) + sent / bandwidth
    if operation == "all-gather":
        return ring
    hops = 2 * (world // nodes - 1), 2 * math.ceil(math.log2(nodes))
    return min(ring, _latency("tree", *hops, nodes) + 2 * size / bandwidth)


def _latency(algorithm: str, within: int, between: int, nodes: int) -> float:
    """Seconds of a call's hops, within nodes and from node to node."""
    hop = _HOP[algorithm] * (_SHARED if nodes > 1 else 1)
    return _BASE[algorithm] + within * hop + between * _HOP_BETWEEN[algorithm]
