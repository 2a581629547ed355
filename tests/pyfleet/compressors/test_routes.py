"""Each route, walked as a reducer walks it: several ranks, several steps, feedback wherever something is encoded."""
import numpy as np
import pytest

from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from tests.pyfleet.compressors.test_contract import CODES, encoded, gradients

N = 2900


def bounds(n, num_ranks, block):
    """Where segments begin and end: multiples of the block, as level as they go."""
    num_blocks = -(-n // block)
    return [min(n, num_blocks * rank // num_ranks * block) for rank in range(num_ranks + 1)]


class Fleet:
    """The ranks' compressors and what they exchange."""

    def __init__(self, spec, num_ranks):
        self.inner = parse_spec(spec)
        self.sources = [ErrorFeedback(self.inner.fresh(), N) for _ in range(num_ranks)]
        self.cuts = bounds(N, num_ranks, self.inner.block)
        self.owners = [ErrorFeedback(self.inner.fresh(), end - start) for start, end in zip(self.cuts, self.cuts[1:], strict=False)]
        self.sent_bytes = 0         # by rank 0

    def reduce(self, grads, step):
        return getattr(self, f"_{self.inner.route}")(grads, step)

    def _gather(self, grads, step):
        total = np.zeros(N, np.float32)
        for rank, (source, grad) in enumerate(zip(self.sources, grads, strict=True)):
            data = encoded(source, grad, step=step, stream=rank)
            source.decode_add(data, total)
            self.sent_bytes += (len(grads) - 1) * len(data) * (rank == 0)
        return total

    _reduce = _gather               # as an all-reduce that sums in float32 and is rounded at the end, which adds nothing here

    def _shard(self, grads, step):
        result, num_ranks = np.empty(N, np.float32), len(grads)
        for owner, (start, end) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            total = np.zeros(end - start, np.float32)
            for rank, (source, grad) in enumerate(zip(self.sources, grads, strict=True)):
                data = encoded(source, grad[start:end], step=step, offset=start, stream=rank)
                source.decode_add(data, total)
                self.sent_bytes += len(data) * (rank == 0 and owner != 0)
            data = encoded(self.owners[owner], total, step=step, stream=num_ranks)
            self.sent_bytes += (num_ranks - 1) * len(data) * (owner == 0)
            self.owners[owner].decode(data, result[start:end])
        return result

    def kept(self):
        """What all residuals hold together."""
        total = np.sum([source.residual.astype(np.float64) for source in self.sources], axis=0)
        return total + np.concatenate([owner.residual for owner in self.owners])


@pytest.mark.feature("P28")
@pytest.mark.parametrize("spec", CODES)
@pytest.mark.parametrize("num_ranks", (1, 2, 5))
def test_every_route_accounts_for_every_gradient(spec, num_ranks):
    fleet, received, given = Fleet(spec, num_ranks), np.zeros(N), np.zeros(N)
    for step in range(30):
        grads = [gradients(N, 100 * step + rank) for rank in range(num_ranks)]
        given += np.sum(grads, axis=0, dtype=np.float64)
        received += fleet.reduce(grads, step)
    size = max(1.0, float(np.abs(given).max()))
    assert np.abs(received + fleet.kept() - given).max() <= 30 * num_ranks * 2.0**-22 * size     # sums in float32


@pytest.mark.feature("S14")
@pytest.mark.parametrize("spec,most", [("int8", 0.26), ("int4", 0.135), ("sign", 0.04), ("fp8", 0.26)])
@pytest.mark.parametrize("num_ranks", (2, 3, 5))
def test_shards_send_the_promised_share_of_a_dense_all_reduce(spec, most, num_ranks, monkeypatch):
    monkeypatch.setattr(f"{__name__}.N", 200_000)
    fleet = Fleet(spec, num_ranks)
    fleet.reduce([gradients(N, rank) for rank in range(num_ranks)], 0)
    assert fleet.sent_bytes <= most * 4 * N * 2 * (num_ranks - 1) / num_ranks * 1.005       # segments end at blocks


@pytest.mark.parametrize("num_ranks", (2, 4, 8))
def test_shards_are_rounded_twice_however_many_ranks_there_are(num_ranks):
    fleet, grads = Fleet("int8", num_ranks), [gradients(N, rank) for rank in range(num_ranks)]
    exact = np.sum(grads, axis=0, dtype=np.float64)
    got = fleet.reduce(grads, 0)
    for start in range(0, N, fleet.inner.block):
        block = slice(start, start + fleet.inner.block)
        steps = [np.abs(grad[block]).max() / 127 for grad in grads] + [np.abs(exact[block]).max() / 127]
        assert (np.abs(got[block] - exact[block]) <= np.sum(steps) / 2 * 1.02).all()
