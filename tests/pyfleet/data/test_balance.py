import itertools
import random

import pytest

from pyfleet.data import balance_workload


def makespan(costs, assignment):
    return max(sum(costs[task] for task in tasks) for tasks in assignment)


def optimum(costs, world_size):
    """By trying every assignment."""
    return min(makespan(costs, [[t for t, owner in enumerate(owners) if owner == rank] for rank in range(world_size)])
               for owners in itertools.product(range(world_size), repeat=len(costs)))


@pytest.mark.feature("C66")
@pytest.mark.parametrize("costs,world_size,best", [
    ([5, 5, 4, 4, 3, 3, 3], 3, 9),          # Graham's worst case: longest first alone gives 11
    ([3, 3, 2, 2, 2], 2, 6),                # longest first alone gives 7
    ([7], 3, 7),
    ([], 2, 0),
    ([0, 0, 0], 2, 0),
    ([10, 1, 1, 1, 1, 1], 2, 10),
    ([4, 3, 2, 1], 1, 10),
])
def test_known_cases_are_optimal(costs, world_size, best):
    assignment = balance_workload(costs, world_size)
    assert len(assignment) == world_size
    assert sorted(itertools.chain(*assignment)) == list(range(len(costs)))
    assert makespan(costs, assignment) == best


@pytest.mark.feature("C66")
@pytest.mark.parametrize("seed", range(12))
def test_small_cases_equal_an_exhaustive_search(seed):
    rng = random.Random(seed)
    world_size = rng.choice([2, 3])
    costs = [rng.choice([rng.random(), rng.randint(1, 30), 5]) for _ in range(rng.randint(1, 8))]
    assert makespan(costs, balance_workload(costs, world_size)) == pytest.approx(optimum(costs, world_size), rel=1e-9)


@pytest.mark.feature("C66")
@pytest.mark.parametrize("n,world_size", [(17, 2), (100, 7), (1000, 64)])
def test_many_tasks_stay_within_grahams_bound(n, world_size):
    rng = random.Random(n)
    costs = [rng.random() for _ in range(n)]
    assignment = balance_workload(costs, world_size)
    assert sorted(itertools.chain(*assignment)) == list(range(n))
    lower = max(sum(costs) / world_size, max(costs))
    assert makespan(costs, assignment) <= (4 / 3 - 1 / (3 * world_size)) * lower + 1e-9
    assert assignment == balance_workload(costs, world_size)


@pytest.mark.parametrize("costs", [[1, -1], [float("nan")], [float("inf")]])
def test_bad_costs_are_refused(costs):
    with pytest.raises(ValueError, match="costs must be finite and >= 0"):
        balance_workload(costs, 2)


def test_bad_world_size_is_refused():
    with pytest.raises(ValueError, match="world_size must be >= 1, got 0"):
        balance_workload([1.0], 0)
