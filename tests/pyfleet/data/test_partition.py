import subprocess
import sys

import numpy as np
import pytest

from pyfleet.data import DataPartitioner, split_by_weight

SIZES = [(0, 1), (0, 4), (1, 3), (7, 3), (10_000, 4), (1797, 5), (3, 64), (64, 64), (1_000_003, 7)]


@pytest.mark.feature("C46")
@pytest.mark.parametrize("total,world_size", SIZES)
def test_partitions_are_disjoint_exhaustive_and_level(total, world_size):
    part = DataPartitioner(total, world_size)
    everything = np.concatenate([part.get_indices(rank) for rank in range(world_size)])
    assert np.array_equal(everything, np.arange(total))
    sizes = [part.partition_size(rank) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.feature("C47", "C48", "C49")
@pytest.mark.parametrize("total,world_size", SIZES)
def test_the_three_views_of_a_partition_agree(total, world_size):
    part = DataPartitioner(total_samples=total, world_size=world_size)
    for rank in range(world_size):
        start, end = part.get_partition(rank)
        indices = part.get_indices(rank)
        assert indices.dtype == np.int64
        assert indices.tolist() == list(range(start, end))
        assert part.partition_size(rank) == end - start


@pytest.mark.feature("C46")
def test_partitioner_names_what_is_wrong():
    with pytest.raises(ValueError, match="total_size must be >= 0, got -1"):
        DataPartitioner(-1, world_size=2)
    with pytest.raises(ValueError, match="world_size must be >= 1, got 0"):
        DataPartitioner(5, world_size=0)
    with pytest.raises(ValueError, match="give the number of samples once"):
        DataPartitioner(world_size=2)
    with pytest.raises(ValueError, match="give the number of samples once"):
        DataPartitioner(5, 2, total_samples=5)
    with pytest.raises(ValueError, match="world_size is missing"):
        DataPartitioner(5)
    part = DataPartitioner(5, 2)
    for ask in (part.get_partition, part.get_indices, part.partition_size):
        for rank in (-1, 2):
            with pytest.raises(ValueError, match=rf"rank {rank} is not in 0 .. 1"):
                ask(rank)


@pytest.mark.feature("M4")
def test_a_batch_splits_by_compute_weight():
    assert split_by_weight(100, [62, 38]) == [62, 38]
    assert split_by_weight(128, [16, 10]) == [79, 49]       # 62 % and 38 %


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 100, 1797, 10**12 + 1])
@pytest.mark.parametrize("weights", [[1], [1, 1], [0.1] * 7, [3, 0, 5], [0, 1e-9, 1e9], [62, 38], [1 / 3, 1 / 7, 2.5]])
def test_split_is_exact_and_proportional(total, weights):
    parts = split_by_weight(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6 * total ** 0.5
        assert weight > 0 or part == 0
    assert parts == split_by_weight(total, list(weights))


def test_split_gives_ties_to_the_lower_index():
    assert split_by_weight(5, [1, 1, 1]) == [2, 2, 1]
    assert split_by_weight(2, [1, 1, 1]) == [1, 1, 0]


def test_split_counts_large_totals_exactly():
    assert split_by_weight(10**30 + 1, [1, 1]) == [5 * 10**29 + 1, 5 * 10**29]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, float("nan")], [float("inf"), 1]])
def test_split_refuses_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be"):
        split_by_weight(10, weights)


def test_split_refuses_a_negative_total():
    with pytest.raises(ValueError, match="total must be >= 0"):
        split_by_weight(-1, [1])


def test_partitioning_does_not_import_torch():
    script = ("import sys, pyfleet.data.partition, pyfleet.data.balance\n"
              "from pyfleet.data import DataPartitioner, balance_workload\n"
              "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
