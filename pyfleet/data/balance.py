"""Which rank does which task, so that the busiest one is done as early as possible."""
from __future__ import annotations

import math
import operator
from collections.abc import Sequence

EXACT_TASKS = 16            # 16 random costs take milliseconds; more grow exponentially
EXACT_NODES = 1_000_000     # about a second; only 16 nearly equal costs were seen to need more (5 s)


def balance_workload(task_costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assign tasks (by index) to ranks so that the largest sum of costs is small; deterministic.

    Longest processing time first, at most 4/3 - 1/(3 world_size) of the optimum (Graham 1969); for up to 16 tasks
    then improved by branch and bound to the optimum, unless that takes more than a second or so, as it may when
    all costs are nearly equal. Each rank's tasks come in ascending order.

    Raises:  ValueError on world_size < 1 or a cost that is negative, infinite or NaN.
    """
    world_size = operator.index(world_size)
    if world_size < 1:
        raise ValueError(f"world_size must be >= 1, got {world_size}")
    costs = [float(cost) for cost in task_costs]
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs must be finite and >= 0, got {list(task_costs)}")
    order = sorted(range(len(costs)), key=lambda task: (-costs[task], task))
    owners = _longest_first([costs[task] for task in order], world_size)
    if len(costs) <= EXACT_TASKS:
        owners = _branch_and_bound([costs[task] for task in order], world_size, owners)
    assignment: list[list[int]] = [[] for _ in range(world_size)]
    for task, owner in zip(order, owners, strict=True):
        assignment[owner].append(task)
    return [sorted(tasks) for tasks in assignment]


def _longest_first(costs: list[float], world_size: int) -> list[int]:
    """The owner of each task, costs descending, giving every task to the rank with the least to do."""
    loads = [0.0] * world_size
    owners = []
    for cost in costs:
        owner = min(range(world_size), key=loads.__getitem__)
        loads[owner] += cost
        owners.append(owner)
    return owners


def _branch_and_bound(costs: list[float], world_size: int, start: list[int]) -> list[int]:
    """The best owners of tasks with descending costs, from `start` downwards."""
    def makespan(owners: list[int]) -> float:
        loads = [0.0] * world_size
        for cost, owner in zip(costs, owners, strict=True):
            loads[owner] += cost
        return max(loads)

    best, best_owners = makespan(start), start
    # Nothing beats the mean load; nor, since some rank has k + 1 of the k * world_size + 1 largest tasks, the sum of
    # the k + 1 smallest of those (k = 0: the largest task).
    bound = max([sum(costs) / world_size] + [sum(costs[last - last // world_size:last + 1])
                                             for last in range(0, len(costs), world_size)])
    bound *= 1 - 1e-12                                  # sums in another order differ by rounding
    rest = [sum(costs[i:]) for i in range(len(costs) + 1)]
    loads, owners, nodes = [0.0] * world_size, [0] * len(costs), 0

    def place(i: int) -> None:
        nonlocal best, best_owners, nodes
        nodes += 1
        if i == len(costs):
            best, best_owners = max(loads), owners.copy()
            return
        # What fits under the best so far on all ranks together must hold the remaining tasks.
        if sum(best - load for load in loads) <= rest[i]:
            return
        tried = set()
        for owner in sorted(range(world_size), key=loads.__getitem__):
            load = loads[owner]
            if load in tried:                           # ranks with equal loads are interchangeable
                continue
            tried.add(load)
            if load + costs[i] >= best or best <= bound or nodes > EXACT_NODES:
                break                                   # later ranks carry more
            loads[owner], owners[i] = load + costs[i], owner
            place(i + 1)
            loads[owner] = load

    place(0)
    return best_owners
