import copy
import gc
import io
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pyfleet.engines import set_current
from pyfleet.errors import ConfigError, DTypeError, NotInitialized, ShapeError
from pyfleet.strategies.data_parallel import DDP, DistributedDataParallel

WORLDS = [1, 2, 3]


GENERATOR = threading.Lock()        # ranks are threads and torch's generator is one per process


def make_model(dtype=torch.float64, seed=0, norm=False):
    with GENERATOR:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Linear(16, 9), nn.Tanh(),
                             nn.Linear(9, 3)).to(dtype)


def make_data(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, 5, generator=generator, dtype=dtype), torch.randn(n, 3, generator=generator, dtype=dtype))


def cut(tensors, sizes, rank):
    start = sum(sizes[:rank])
    return [tensor[start:start + sizes[rank]] for tensor in tensors]


def mse(model, x, y):
    return (model(x) - y).square().mean()


def step(model, lr=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    model.zero_grad()


@torch.no_grad()
def difference(mine, theirs):
    """The largest relative difference of two lists of tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True))


def alone(batches, steps=3, **options):
    """The parameters after training in one process on whole batches."""
    model = make_model(**options)
    for _ in range(steps):
        for x, y in batches:
            mse(model, x, y).backward()
            step(model)
    return list(model.parameters())


def identical(per_rank):
    return all(torch.equal(a, b) for other in per_rank for a, b in zip(per_rank[0], other, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("bucket_size_mb", [1e-5, 0.001, 25])
def test_equal_shares_train_like_one_process(thread_ranks, world_size, bucket_size_mb):
    data = make_data(12)

    def rank(engine):
        ddp = DDP(make_model(seed=engine.rank), bucket_size_mb, engine=engine)
        x, y = cut(data, [12 // world_size] * world_size, engine.rank)
        for _ in range(3):
            mse(ddp, x, y).backward()
            step(ddp)
        return list(ddp.parameters())
    results = thread_ranks(world_size, rank)
    assert identical(results)
    assert difference(results[0], alone([data])) < 1e-12


@pytest.mark.parametrize("sizes", [[7], [5, 2], [0, 4], [4, 0, 1], [1, 2, 4], [62, 38]])
def test_uneven_shares_weighted_by_samples_train_like_one_process(thread_ranks, sizes):
    data = make_data(sum(sizes))

    def rank(engine):
        ddp = DDP(make_model(), 0.001, engine=engine)
        x, y = cut(data, sizes, engine.rank)
        for _ in range(3):
            with ddp.set_samples(len(x), sum(sizes)):
                if len(x):
                    mse(ddp, x, y).backward()
                else:
                    ddp.participate()
            step(ddp)
        return list(ddp.parameters())
    results = thread_ranks(len(sizes), rank)
    assert identical(results)
    assert difference(results[0], alone([data])) < 1e-12


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_narrow_dtypes_train_too(thread_ranks, dtype, tolerance):
    data = make_data(8, dtype)

    def rank(engine):
        ddp = DDP(make_model(dtype), engine=engine)
        ddp.set_samples([3, 5][engine.rank], 8)
        mse(ddp, *cut(data, [3, 5], engine.rank)).backward()
        return [parameter.grad for parameter in ddp.parameters()]
    results = thread_ranks(2, rank)
    assert identical(results)
    reference = make_model(dtype)
    mse(reference, *data).backward()
    assert all(grad.dtype == dtype for grad in results[0])
    assert difference([grad.double() for grad in results[0]],
                      [parameter.grad.double() for parameter in reference.parameters()]) < tolerance


def test_mixed_dtypes_have_buckets_of_their_own(thread_ranks):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(2, 2).double(), nn.Linear(2, 2)

        def forward(self, x):
            return self.narrow(self.wide(x).float()).sum()

    def rank(engine):
        torch.manual_seed(0)
        ddp = DDP(Mixed(), engine=engine)
        ddp(torch.ones(1, 2, dtype=torch.float64)).backward()
        return ddp.num_buckets, [parameter.grad.dtype for parameter in ddp.parameters()]
    assert thread_ranks(2, rank) == [(2, [torch.float64] * 2 + [torch.float32] * 2)] * 2


def exchanges(engine):
    return [call for call in engine.calls if call[0] == "all_reduce" and call[3] == "mean"]


@pytest.mark.feature("A24")
@pytest.mark.parametrize("sizes", [[[2, 2], [2, 2], [2, 2], [2, 2]], [[3, 1], [0, 2], [1, 4], [2, 0]]])
def test_accumulation_sends_once_and_equals_the_large_batch(thread_ranks, sizes):
    """sizes[m][rank]: samples of the m-th micro-batch."""
    data = make_data(sum(map(sum, sizes)))
    starts = [sum(map(sum, sizes[:m])) for m in range(len(sizes))]

    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        local = sum(size[engine.rank] for size in sizes)
        last = max(m for m in range(4) if sizes[m][engine.rank])
        ddp.set_samples(local, len(data[0]))
        for _ in range(3):
            for m, size in enumerate(sizes):
                x, y = cut([tensor[starts[m]:] for tensor in data], size, engine.rank)
                if len(x):
                    with nullcontext() if m == last else ddp.no_sync():
                        (mse(ddp, x, y) * len(x) / local).backward()
            step(ddp)
        return list(ddp.parameters()), len(exchanges(engine))
    results = thread_ranks(2, rank)
    assert identical([parameters for parameters, _ in results])
    assert difference(results[0][0], alone([data])) < 1e-12
    assert [count for _, count in results] == [3, 3]


def test_no_sync_leaves_local_gradients(thread_ranks):
    data = make_data(4)

    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        x, y = cut(data, [2, 2], engine.rank)
        with ddp.no_sync(), ddp.no_sync():
            mse(ddp, x, y).backward()
        reference = make_model()
        mse(reference, x, y).backward()
        return len(exchanges(engine)), all(torch.equal(a.grad, b.grad) for a, b in
                                           zip(ddp.parameters(), reference.parameters(), strict=True))
    assert thread_ranks(2, rank) == [(0, True)] * 2


def test_a_second_backward_adds_to_the_averaged_gradient(thread_ranks):
    data = make_data(6)

    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        ddp.set_samples([4, 2][engine.rank], 6)
        for _ in range(2):
            mse(ddp, *cut(data, [4, 2], engine.rank)).backward()
        return [parameter.grad for parameter in ddp.parameters()]
    reference = make_model()
    for _ in range(2):
        mse(reference, *data).backward()
    results = thread_ranks(2, rank)
    assert difference(results[1], [parameter.grad for parameter in reference.parameters()]) < 1e-12


@pytest.mark.feature("A6")
def test_the_number_of_buckets_follows_from_the_bytes(thread_ranks):
    def rank(engine):
        model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(26)])        # 1 MiB each
        return DDP.builder(model).bucket_size_mb(2.5).broadcast_buffers(True).engine(engine).build().num_buckets
    assert thread_ranks(2, rank) == [11, 11]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_lie_in_the_engines_memory(thread_ranks, set_to_none):
    data = make_data(4)

    def rank(engine):
        ddp = DDP(make_model(), 0.001, engine=engine)
        memory = [torch.frombuffer(block, dtype=torch.uint8) for block in engine.allocated]
        places, where = [(block.data_ptr(), block.data_ptr() + len(block)) for block in memory], []
        for _ in range(3):
            ddp.zero_grad(set_to_none)
            mse(ddp, *data).backward()
            where.append([parameter.grad.data_ptr() for parameter in ddp.parameters()])
        assert all(any(start <= pointer < end for start, end in places) for pointer in where[0])
        return where[0] == where[1] == where[2], len(places) == ddp.num_buckets == 3
    assert thread_ranks(2, rank) == [(True, True)] * 2


def test_a_gradient_kept_as_zeros_is_never_copied_again(thread_ranks):
    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        mse(ddp, *make_data(4)).backward()
        ddp.zero_grad(set_to_none=False)
        kept, objects = [parameter.grad for parameter in ddp.parameters()], []
        for bucket in ddp._buckets:
            for view in bucket.views:
                objects.append(view)
                view.copy_ = lambda *_: pytest.fail("copied")
        mse(ddp, *make_data(4)).backward()
        return all(parameter.grad is grad for parameter, grad in zip(ddp.parameters(), kept, strict=True))
    assert thread_ranks(2, rank) == [True] * 2


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_buffers_follow_rank_0_if_wanted(thread_ranks, broadcast_buffers):
    data = make_data(12)

    def rank(engine):
        ddp = DDP(make_model(norm=True), broadcast_buffers=broadcast_buffers, engine=engine)
        for _ in range(3):
            mse(ddp, *cut(data, [4, 8], engine.rank)).backward()
            step(ddp)
        return [buffer.clone() for buffer in ddp.buffers()]
    mine, theirs = thread_ranks(2, rank)
    equal = [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)]
    assert equal == [broadcast_buffers] * 2 + [True]        # running mean, running variance, number of batches
    assert mine[2] == 3


def test_construction_copies_rank_0(thread_ranks):
    def rank(engine):
        model = make_model(seed=engine.rank, norm=True)
        model[1].running_mean.fill_(engine.rank + 1)
        model[0].bias.requires_grad_(False)
        DDP(model, broadcast_buffers=False, engine=engine)
        return list(model.state_dict().values())
    results = thread_ranks(3, rank)
    assert identical(results)
    assert results[2][4].tolist() == [1] * 16


@pytest.mark.parametrize("change,names", [
    (lambda m: m.append(nn.Linear(3, 3).double()), "rank . has . parameters and buffers, and the ranks have between 6 and 8"),
    (lambda m: m.__setitem__(4, nn.Linear(9, 4).double()), r"parameter 4.weight float64\[., 9\] \(trained\)"),
    (lambda m: m.float(), r"parameter 0.weight float..\[16, 5\] \(trained\); .*, \.\.\."),
    (lambda m: m[2].bias.requires_grad_(False), r"rank . has parameter 2.bias float64\[9\]"),
])
def test_different_models_are_a_clear_error_on_every_rank(thread_ranks, change, names):
    def rank(engine):
        model = make_model()
        if engine.rank == 1:
            change(model)
        with pytest.raises(ShapeError, match=names):
            DDP(model, engine=engine)
        return True
    assert thread_ranks(3, rank) == [True] * 3


def test_different_settings_are_a_clear_error_on_every_rank(thread_ranks):
    def rank(engine):
        with pytest.raises(ShapeError, match="bucket_size_mb="):
            DDP(make_model(), bucket_size_mb=1 + engine.rank, engine=engine)
        return True
    assert thread_ranks(2, rank) == [True] * 2


def test_a_parameter_unused_on_one_rank_gets_the_others_share(thread_ranks):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(2, 1, bias=False) for _ in range(3))

        def forward(self, x, branch):
            return getattr(self, branch)(x).sum()

    def rank(engine):
        torch.manual_seed(0)
        ddp = DDP(Branches(), bucket_size_mb=1e-6, engine=engine)
        for _ in range(2):
            ddp.zero_grad()
            ddp(torch.ones(1, 2), ["first", "second"][engine.rank]).backward()
        return [None if parameter.grad is None else parameter.grad.tolist() for parameter in ddp.parameters()]
    assert thread_ranks(2, rank) == [[[[0.5, 0.5]], [[0.5, 0.5]], None]] * 2


def test_tied_and_frozen_parameters(thread_ranks):
    data = make_data(4)

    reference = make_model()
    reference.extend([nn.Linear(3, 9, bias=False).double(), nn.Linear(9, 3).double()])
    reference[6].weight = reference[4].weight
    reference[0].weight.requires_grad_(False)
    models = [copy.deepcopy(reference) for _ in range(2)]
    mse(reference, *data).backward()

    def rank(engine):
        ddp = DDP(models[engine.rank], engine=engine)
        mse(ddp, *cut(data, [2, 2], engine.rank)).backward()
        return [parameter.grad for parameter in ddp.parameters()]
    for grads in thread_ranks(2, rank):
        expected = [parameter.grad for parameter in reference.parameters()]
        assert [grad is None for grad in grads] == [grad is None for grad in expected] == [True] + [False] * 7
        assert difference(grads[1:], expected[1:]) < 1e-12


@pytest.mark.feature("A7", "M18")
def test_the_wrapper_is_transparent(thread_ranks):
    def rank(engine):
        model = make_model(norm=True)
        model.note = "mine"
        ddp = DistributedDataParallel(model, engine=engine)
        assert ddp.module is model
        assert ddp.engine is engine
        assert list(ddp.state_dict()) == list(model.state_dict())
        assert [name for name, _ in ddp.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert [name for name, _ in ddp.named_buffers()] == [name for name, _ in model.named_buffers()]
        assert all(a is b for a, b in zip(ddp.parameters(), model.parameters(), strict=True))
        assert ddp.note == "mine"
        with pytest.raises(AttributeError, match="nothing"):
            ddp.nothing     # noqa: B018
        ddp.eval()
        assert not model.training
        x = make_data(3)[0]
        assert torch.equal(ddp(x), model(x))
        other = make_model(seed=5, norm=True)
        ddp.load_state_dict(other.state_dict())
        assert identical([list(model.state_dict().values()), list(other.state_dict().values())])
        torch.save(ddp.state_dict(), io.BytesIO())
        assert copy.deepcopy(ddp.module)(x).shape == (3, 3)
        return True
    assert thread_ranks(2, rank) == [True] * 2


def test_forward_takes_any_arguments_and_gives_any_outputs(thread_ranks):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, *, times):
            return {"loss": [self.scale * x * times], "note": "text"}

    def rank(engine):
        ddp = DDP(Words(), engine=engine)
        ddp(torch.tensor([2.0]), times=engine.rank + 1)["loss"][0].backward()
        return ddp.scale.grad.item()
    assert thread_ranks(2, rank) == [3.0, 3.0]


def test_no_gradients_no_traffic(thread_ranks):
    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        before = len(engine.calls)
        with torch.no_grad():
            ddp(make_data(2)[0])
        return len(engine.calls) - before
    assert thread_ranks(2, rank) == [0, 0]


def test_wrapping_again_replaces_the_wrapper(thread_ranks):
    def rank(engine):
        model = make_model()
        first, second = DDP(model, engine=engine), DDP(model, engine=engine)
        mse(second, *make_data(4)).backward()
        with pytest.raises(RuntimeError, match="wrapped again"):
            first(make_data(4)[0])
        return len(exchanges(engine))
    assert thread_ranks(2, rank) == [1, 1]


def test_a_dropped_wrapper_leaves_the_model_alone(thread_ranks):
    def rank(engine):
        model = make_model()
        DDP(model, engine=engine)
        gc.collect()
        mse(model, *make_data(4)).backward()
        return len(exchanges(engine))
    assert thread_ranks(2, rank) == [0, 0]


def test_thawing_after_wrapping_is_a_clear_error(thread_ranks):
    def rank(engine):
        model = make_model()
        model[0].weight.requires_grad_(False)
        ddp = DDP(model, engine=engine)
        model[0].weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match="0.weight was frozen when the model was wrapped"):
            ddp(make_data(2)[0])
        return True
    assert thread_ranks(2, rank) == [True] * 2


def test_sparse_embeddings_are_refused(thread_ranks):
    def rank(engine):
        with pytest.raises(DTypeError, match="0 makes sparse gradients"):
            DDP(nn.Sequential(nn.Embedding(3, 2, sparse=True)), engine=engine)
        return True
    assert thread_ranks(2, rank) == [True] * 2


@pytest.mark.parametrize("local,total", [(-1, 4), (5, 4), (0, 0), (1, None)])
def test_impossible_sample_counts_are_refused(thread_ranks, local, total):
    def rank(engine):
        with pytest.raises(ValueError, match="0 <= local <= total"):
            DDP(make_model(), engine=engine).set_samples(local, total)
        return True
    assert thread_ranks(1, rank) == [True]


def test_sample_counts_last_until_changed_or_the_block_ends(thread_ranks):
    def rank(engine):
        ddp = DDP(make_model(), engine=engine)
        weights = [ddp._reducer.weight]
        ddp.set_samples(1, 4)
        weights.append(ddp._reducer.weight)
        with ddp.set_samples(4, 4):
            weights.append(ddp._reducer.weight)
        weights.append(ddp._reducer.weight)
        ddp.set_samples(None)
        return [*weights, ddp._reducer.weight]
    assert thread_ranks(2, rank) == [[1, 0.5, 2, 0.5, 1]] * 2


@pytest.mark.parametrize("wrong", [-1, 0.5, True, "biases"])
def test_dense_below_is_a_number_of_elements_or_a_rule(wrong):
    with pytest.raises(ConfigError, match="dense_below must be a number of elements >= 0 or a function"):
        DDP.builder(make_model()).dense_below(wrong).engine(object()).build()


def test_compression_names_what_is_offered():
    with pytest.raises(ConfigError, match="unknown compression 'tpok'; did you mean topk"):
        DDP(make_model(), compression="tpok", engine=object())


def test_without_a_fleet_it_says_so():
    set_current(None)
    with pytest.raises(NotInitialized, match="pyfleet.init"):
        DDP(make_model())


def test_a_model_without_trained_parameters_works(thread_ranks):
    def rank(engine):
        ddp = DDP(nn.Flatten(), engine=engine)
        return ddp.num_buckets, ddp(torch.ones(2, 3, 1)).shape
    assert thread_ranks(2, rank) == [(0, (2, 3))] * 2


def test_the_table_names_what_there_is():
    from importlib import import_module

    from pyfleet import strategies
    for target in strategies.STRATEGIES.values():
        module, _, name = target.partition(":")
        assert issubclass(getattr(import_module(module), name), strategies.Strategy)
    assert strategies.DDP is strategies.DistributedDataParallel is DDP
    with pytest.raises(AttributeError, match="nothing"):
        strategies.nothing      # noqa: B018
