"""C2, open set: collective algorithms as pure functions from (rank, size, bounds) to rows. `base` is the contract."""

SCHEDULES = {       # verb -> algorithm -> where it is; of equally good ones, the first is taken
    "all_reduce": {
        "ring": "fleetcore.schedules.ring:all_reduce",
        "direct": "fleetcore.schedules.direct:all_reduce",
        "halving": "fleetcore.schedules.halving:all_reduce",
        "tree": "fleetcore.schedules.tree:all_reduce",
        "star": "fleetcore.schedules.star:all_reduce",
    },
    "reduce_scatter": {
        "ring": "fleetcore.schedules.ring:reduce_scatter",
        "direct": "fleetcore.schedules.direct:reduce_scatter",
        "halving": "fleetcore.schedules.halving:reduce_scatter",
    },
    "all_gather": {
        "ring": "fleetcore.schedules.ring:all_gather",
        "direct": "fleetcore.schedules.direct:all_gather",
        "halving": "fleetcore.schedules.halving:all_gather",
    },
    "broadcast": {
        "tree": "fleetcore.schedules.tree:broadcast",
        "ring": "fleetcore.schedules.ring:broadcast",
        "direct": "fleetcore.schedules.direct:broadcast",
        "star": "fleetcore.schedules.star:broadcast",
    },
    "reduce": {
        "tree": "fleetcore.schedules.tree:reduce",
        "ring": "fleetcore.schedules.ring:reduce",
        "direct": "fleetcore.schedules.direct:reduce",
        "star": "fleetcore.schedules.star:reduce",
    },
    "gather": {     # one hop is both
        "direct": "fleetcore.schedules.star:gather",
        "star": "fleetcore.schedules.star:gather",
    },
    "scatter": {
        "direct": "fleetcore.schedules.star:scatter",
        "star": "fleetcore.schedules.star:scatter",
    },
    "all_to_all": {"direct": "fleetcore.schedules.direct:all_to_all"},
}
