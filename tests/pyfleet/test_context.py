"""DistributedContext across real processes."""
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import pyfleet


def profiled(path):
    ctx = pyfleet.DistributedContext()
    rank, size = ctx.rank(), ctx.world_size()
    assert ctx.is_master() == (rank == 0) and ctx.fleet is pyfleet.init()
    before = ctx.get_communication_stats()
    assert before["events"] == []
    ctx.enable_profiling()
    x = np.ones(100_000, np.float32)
    for _ in range(3):
        ctx.all_reduce(x)
    ctx.barrier()
    after = ctx.get_communication_stats()
    events = after["events"]
    assert [event["operation"] for event in events] == ["all_reduce"] * 3 + ["barrier"]
    assert [event["bytes"] for event in events] == [400_000] * 3 + [1]
    assert all(event["seconds"] > 0 for event in events)
    assert all(a["start"] < b["start"] for a, b in pairwise(events))
    assert after["operations"]["all_reduce"]["bytes"] - before["operations"].get("all_reduce", {}).get("bytes", 0) == 1_200_000
    ctx.export_trace(f"{path}/{rank}.json")
    assert len(json.loads(Path(f"{path}/{rank}.json").read_text())["traceEvents"]) == 4
    ctx.enable_profiling(False)
    ctx.barrier()
    assert ctx.get_communication_stats()["events"] == []
    with pytest.raises(ValueError, match="already rank"):
        pyfleet.DistributedContext(world_size=size + 1, rank=rank)
    return {name: after[name] - before[name] for name in ("bytes_sent", "bytes_received", "messages_count", "shared_memory_bytes")}


@pytest.mark.feature("C86")
def test_counters_over_links_are_the_actual_traffic(ranks, tmp_path):
    counts = ranks(3, "tcp").run(profiled, str(tmp_path))
    optimum = 3 * 2 * 2 / 3 * 400_000
    assert sum(c["bytes_sent"] for c in counts) == sum(c["bytes_received"] for c in counts)      # each byte arrives once
    assert all(optimum < c["bytes_sent"] < 1.01 * optimum and c["messages_count"] > 12 for c in counts)
    assert all(c["shared_memory_bytes"] == 0 for c in counts)


@pytest.mark.feature("C7", "C21")
def test_counters_in_shared_memory(ranks, tmp_path):
    counts = ranks(2, "shm").run(profiled, str(tmp_path))
    assert all(c["bytes_sent"] == 0 and c["shared_memory_bytes"] >= 3 * 400_000 for c in counts)


def test_an_invalid_rank_is_a_value_error():
    for world_size, rank in ((4, 4), (4, -1), (0, 0), (-2, None)):
        with pytest.raises(ValueError, match="world_size"):
            pyfleet.DistributedContext(world_size=world_size, rank=rank)
