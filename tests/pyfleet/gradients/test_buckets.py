import math

import pytest
import torch
from torch import nn

from pyfleet.errors import ConfigError, DTypeError
from pyfleet.gradients import Bucket, assign, make_buckets

MIB = 2**20


def parameters(*mib, dtype=torch.float32):
    """Parameters of so many MiB that take no memory."""
    return [torch.empty(int(size * MIB / dtype.itemsize), dtype=dtype, device="meta") for size in mib]


@pytest.mark.parametrize("sizes,bucket_mb", [
    ([10] * 30, 25), ([1] * 100, 25), ([5] * 10, 25), ([20, 6], 25), ([25] * 3, 25), ([0.5], 25), ([24, 2, 24, 2], 25),
    ([13, 7, 1, 22, 3, 3, 9, 25, 0.001], 25), ([1, 2, 3], 3.5),
])
def test_the_number_of_buckets_is_the_bytes_over_the_bucket_size(sizes, bucket_mb):
    plan = assign(parameters(*sizes), bucket_mb * MIB)
    assert len(plan) == math.ceil(sum(sizes) / bucket_mb)
    assert [i for indices in plan for i in indices] == list(reversed(range(len(sizes))))


def test_a_parameter_larger_than_a_bucket_makes_a_larger_bucket():
    assert assign(parameters(1, 100, 1), 25 * MIB) == [[2], [1, 0]]
    assert assign(parameters(1, 100, 24, 1), 25 * MIB) == [[3, 2], [1], [0]]
    assert len(assign(parameters(100), 25 * MIB)) == 1


def test_buckets_do_not_mix_dtypes_and_come_as_backward_completes_them():
    mixed = [*parameters(1, 1), *parameters(1, dtype=torch.float64), *parameters(1), *parameters(1, dtype=torch.bfloat16)]
    assert assign(mixed, 25 * MIB) == [[4], [2], [3, 1, 0]]


def test_no_parameters_make_no_buckets():
    assert assign([], 25 * MIB) == []
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert make_buckets([("frozen", frozen)], 25, bytearray) == []


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_a_bucket_size_must_be_positive(size):
    with pytest.raises(ConfigError, match="bucket_size_mb must be > 0"):
        make_buckets([], size, bytearray)


def test_complex_parameters_are_refused_by_name():
    with pytest.raises(DTypeError, match=r"parameter w is torch.complex64; .* float32, float64, float16, bfloat16"):
        make_buckets([("w", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))], 25, bytearray)


def bucket_of(*shapes, dtype=torch.float32):
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    memory = []

    def allocate(nbytes):
        memory.append(bytearray(b"\xa5" * nbytes))
        return memory[-1]
    bucket = Bucket([(f"p{i}", parameter) for i, parameter in enumerate(parameters)], allocate)
    assert len(memory) == 1
    return bucket, parameters, memory[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_are_views_of_the_engines_memory(dtype):
    bucket, parameters, memory = bucket_of((3, 5), (), (0,), (7,), dtype=dtype)
    whole = torch.frombuffer(memory, dtype=dtype)
    assert whole.data_ptr() == bucket.flat.data_ptr()
    assert whole.numel() == 15 + 1 + 0 + 7 + 4
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, i + 1)
    bucket.seal(1)
    assert whole.tolist() == [1.0] * 15 + [2] + [4] * 7 + [1] * 4
    offset = 0
    for parameter in parameters:
        if parameter.numel():
            assert parameter.grad.data_ptr() == whole.data_ptr() + offset * dtype.itemsize
        offset += parameter.numel()


def test_a_gradient_that_is_the_view_is_not_copied():
    bucket, (parameter,), _ = bucket_of((4,))
    parameter.grad = torch.arange(4.0)
    bucket.adopt(0)
    view, version = parameter.grad, parameter.grad._version
    bucket.adopt(0)
    bucket.seal(1)
    assert parameter.grad is view
    assert parameter.grad._version == version + 1       # writing the flags, which share the memory's counter


def test_a_parameter_with_other_strides_lies_row_major():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    bucket = Bucket([("w", parameter)], bytearray)
    parameter.grad = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    bucket.adopt(0)
    assert bucket.values.tolist() == list(range(120))
    assert parameter.grad.is_contiguous()


def test_weights_scale_and_zero_drops_even_nan():
    bucket, (parameter,), _ = bucket_of((2,))
    parameter.grad = torch.tensor([1.0, 2.0])
    bucket.seal(1.5)
    assert bucket.flat.tolist() == [1.5, 3, 1]
    parameter.grad.fill_(float("nan"))
    bucket.seal(0)
    assert bucket.flat.tolist() == [0, 0, 1]


def test_only_parameters_that_some_rank_used_get_a_gradient():
    bucket, (used_here, used_there, unused), _ = bucket_of((2,), (1,), (1,))
    used_here.grad = torch.ones(2)
    bucket.seal(1)
    assert bucket.flat.tolist() == [1, 1, 0, 0, 1, 0, 0]
    bucket.flat.copy_(torch.tensor([0.5, 0.5, 3, 0, 0.5, 0.5, 0]))      # as the mean over two ranks might be
    bucket.deliver()
    assert used_here.grad.tolist() == [0.5, 0.5]
    assert used_there.grad.tolist() == [3]
    assert unused.grad is None


def test_a_sparse_gradient_is_refused_by_name():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    bucket = Bucket([("table", embedding.weight)], bytearray)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(DTypeError, match="the gradient of table is sparse"):
        bucket.adopt(0)


def test_what_is_to_stay_dense_has_buckets_of_its_own():
    model = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50), nn.Linear(50, 3))
    buckets = make_buckets(model.named_parameters(), 1.0, bytearray, lambda name, parameter: parameter.ndim < 2)
    assert {tuple(bucket.names): bucket.dense for bucket in buckets} == {
        ("2.weight", "0.weight"): False, ("2.bias", "1.bias", "1.weight", "0.bias"): True}
    assert [bucket.dense for bucket in make_buckets(model.named_parameters(), 1.0, bytearray)] == [False]
