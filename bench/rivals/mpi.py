"""MPI through mpi4py: needs ranks that mpirun started."""
from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import mpi4py
import numpy as np

from bench.systems import System

mpi4py.rc.initialize, mpi4py.rc.finalize = False, True      # the import must not start MPI, the exit must end it


class Mpi(System):
    """MPI_Allreduce in place on a numpy array, over whatever this MPI uses within a host."""

    bound = "memory"

    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        if not os.environ.keys() & {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}:
            raise RuntimeError("the ranks were not started by mpirun")
        from mpi4py import MPI
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_FUNNELED)    # one thread calls: spares MPI the locks of mpi4py's default
        if (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) != (rank, size):
            raise RuntimeError(f"MPI counts rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size}, not {rank} of {size}")
        self._all_reduce, self._in_place = MPI.COMM_WORLD.Dup().Allreduce, MPI.IN_PLACE

    def array(self, num_elems: int) -> Any:
        return np.empty(num_elems, np.float32)

    def write(self, handle: Any, values: np.ndarray) -> None:
        np.copyto(handle, values)

    def call(self, handle: Any) -> None:
        self._all_reduce(self._in_place, handle)

    def read(self, handle: Any) -> np.ndarray:
        return handle

    def close(self) -> None:
        """MPI ends with the process: it cannot be started twice."""


def can_start_ranks() -> bool:
    """Whether mpirun is there to start them."""
    return shutil.which("mpirun") is not None
