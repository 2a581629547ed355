"""A data-parallel training step of a small model on 1 to N ranks: samples per second, and where the time goes."""
from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from pyfleet.benchmarks.base import MAX_REPS, MIN_REPS, ROW_S, Ranks
from pyfleet.collectives import new_group
from pyfleet.engines import Engine
from pyfleet.strategies.data_parallel import DistributedDataParallel

BATCH = 64      # samples of one rank, whatever their number (weak scaling)
SEED = 0


def measure(ranks: Ranks, sizes: list[int]) -> list[dict[str, Any]]:
    """One row a size and number of ranks; the first n ranks train while the others wait. Every rank calls it; rank 0 gets all.

    Args:    sizes: bytes of the model's parameters, about.
    Returns: {"size": bytes of the parameters, "ranks": n, "samples_per_s", "efficiency": of n times what one rank does,
             and seconds of every sample, of the slowest rank: "seconds": a step; "compute_s": the same step by the same ranks
             at once without sending anything; "communication_s": in collective calls, much of which backward hides}.
    """
    rows: list[dict[str, Any]] = []
    for num_bytes in sizes:
        for num_ranks in range(1, ranks.size + 1):
            group = new_group(range(num_ranks))
            if group.engine is not None:
                rows.append(_row(group.engine, num_bytes))
            ranks.barrier()
            group.close()
    alone = {row["size"]: row["samples_per_s"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["efficiency"] = row["samples_per_s"] / (row["ranks"] * alone[row["size"]]) if row["size"] in alone else None
    return rows


def _row(engine: Engine, num_bytes: int) -> dict[str, Any]:
    torch.set_num_threads(1)        # a rank has a core, not the machine
    torch.manual_seed(SEED + engine.rank)
    model = make_model(num_bytes)
    width = model[0].in_features
    ddp = DistributedDataParallel(model, engine=engine)
    # At a rate of 0 the optimiser does the same work, and the steps without sending leave the ranks' models alike.
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.0)
    inputs, targets = torch.randn(BATCH, width), torch.randn(BATCH, width)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(inputs), targets).backward()
        optimizer.step()

    def timed(sends: bool) -> tuple[float, float]:
        engine.barrier()
        engine.record()
        start = time.perf_counter()
        if sends:
            step()
        else:
            with ddp.no_sync():
                step()
        elapsed = time.perf_counter() - start
        word = np.array([elapsed, sum(ended - began for _, _, began, ended, _ in engine.recorded())])
        engine.record(False)
        engine.all_reduce(word, "max")
        return float(word[0]), float(word[1])

    taken: dict[str, list[float]] = {"seconds": [], "compute_s": [], "communication_s": []}
    reps, rep = MIN_REPS, -2        # the first turn warms up, the second one plans
    while rep < reps:
        (whole, communication), (compute, _) = timed(True), timed(False)
        if rep == -1:
            reps = max(MIN_REPS, min(MAX_REPS, int(ROW_S / (whole + compute))))
        elif rep >= 0:
            for name, seconds in (("seconds", whole), ("compute_s", compute), ("communication_s", communication)):
                taken[name].append(seconds)
        rep += 1
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"size": size, "ranks": engine.world_size, **taken,
            "samples_per_s": engine.world_size * BATCH / statistics.median(taken["seconds"])}


def make_model(num_bytes: int) -> nn.Sequential:
    """Two square layers with about num_bytes of float32 parameters."""
    width = max(1, math.isqrt(num_bytes // 8))
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
