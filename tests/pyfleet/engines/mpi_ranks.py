"""mpirun -n N python -m tests.pyfleet.engines.mpi_ranks DIR: every check of the contract over MPI.

Each rank writes one JSON line per check to DIR/<rank>.
"""
import json
import sys
import traceback
from pathlib import Path

import pyfleet
from tests.pyfleet.engines import contract
from tests.pyfleet.test_testing import digits_training


def training():
    losses, weights = digits_training(1)
    return losses, weights.tolist()


def main():
    fleet = pyfleet.init(backend="mpi")
    checks = {name: check for name, (check, fewest) in contract.CHECKS.items() if fleet.world_size >= fewest}
    with Path(sys.argv[1], str(fleet.rank)).open("w", buffering=1) as report:
        for name, check in (checks | {"training": training, "late": contract.late}).items():    # the last ends the group
            try:
                result = check()
            except BaseException:   # noqa: BLE001 mpirun must end the others, which may wait for this rank
                report.write(json.dumps({"failed": name, "rank": fleet.rank, "trace": traceback.format_exc()}) + "\n")
                from mpi4py import MPI
                MPI.COMM_WORLD.Abort(1)
            report.write(json.dumps({"passed": name, "rank": fleet.rank, "result": result}) + "\n")


if __name__ == "__main__":
    main()
