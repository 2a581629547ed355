"""C2, open set: collective algorithms as pure functions from (rank, size, count) to rows. `base` is the contract."""

SCHEDULES = {       # verb -> algorithm -> where it is
    "all_reduce": {
        "ring": "fleetcore.schedules.ring:all_reduce",
        "direct": "fleetcore.schedules.direct:all_reduce",
        "tree": "fleetcore.schedules.tree:all_reduce",
    },
    "reduce_scatter": {"ring": "fleetcore.schedules.ring:reduce_scatter"},
    "all_gather": {"ring": "fleetcore.schedules.ring:all_gather"},
    "broadcast": {"tree": "fleetcore.schedules.tree:broadcast"},
}
