import pytest
import torch

from pyfleet.gradients import BufferBroadcast


class Odd(torch.nn.Module):
    """Buffers of many dtypes and shapes, one of them empty, one not saved, one absent."""

    def __init__(self, rank):
        super().__init__()
        self.register_buffer("flags", torch.tensor([rank == 0] * 3))
        self.register_buffer("brief", torch.full((3, 5), float(rank), dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("phase", torch.tensor([complex(rank, 1)] * 2), persistent=False)
        self.register_buffer("wide", torch.full((4, 3), rank, dtype=torch.float64).t())
        self.register_buffer("absent", None)


def values(module):
    return {name: (buffer.dtype, buffer.tolist()) for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_buffers_become_rank_0s_in_one_message(thread_ranks, world_size):
    def rank(engine):
        module = Odd(engine.rank)
        broadcast = BufferBroadcast(module, engine)
        module.count = torch.tensor(engine.rank + 10)           # replaced, not written to
        broadcast.submit().wait()
        broadcast.deliver()
        return values(module), len(engine.calls)
    expected = Odd(0)
    expected.count = torch.tensor(10)
    assert thread_ranks(world_size, rank) == [(values(expected), 1)] * world_size


def test_a_module_without_buffers_sends_nothing(thread_ranks):
    def rank(engine):
        broadcast = BufferBroadcast(torch.nn.Linear(2, 2), engine)
        return broadcast.submit(), engine.calls
    assert thread_ranks(2, rank) == [(None, [])] * 2
