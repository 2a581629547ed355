"""MPI through mpi4py: needs ranks that mpirun started."""
from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import mpi4py
import numpy as np

from bench.systems import System
from bench.verbs import ROOT, Arrays, Party

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
        self.comm = MPI.COMM_WORLD.Dup()
        self._all_reduce, self._in_place = self.comm.Allreduce, MPI.IN_PLACE

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


class MpiVerbs(Party):
    """MPI's verbs on numpy arrays, over whatever this MPI uses within a host; the upper-case ones, which pickle nothing."""

    bound = "memory"
    start, close = Mpi.start, Mpi.close

    def ready(self, verb: str, arrays: Arrays) -> Callable[[], Any]:
        comm, x, out, rank, in_place = self.comm, arrays.x, arrays.out, arrays.rank, self._in_place
        if verb in ("round_trip", "one_way"):
            calls = {0: [lambda: comm.Send(x, 1), lambda: comm.Recv(x, 1)], 1: [lambda: comm.Recv(x, 0), lambda: comm.Send(x, 0)]}
            first, second = calls.get(rank, [lambda: None] * 2)
            return first if verb == "one_way" else lambda: [first(), second()]
        return {
            "all_reduce": lambda: comm.Allreduce(in_place, x),
            "reduce": (lambda: comm.Reduce(in_place, x, root=ROOT)) if rank == ROOT else lambda: comm.Reduce(x, None, root=ROOT),
            "broadcast": lambda: comm.Bcast(x, ROOT),
            "all_gather": lambda: comm.Allgather(x, out),
            "gather": lambda: comm.Gather(x, out, ROOT),
            "scatter": lambda: comm.Scatter(x, out, ROOT),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(x, out),
            "all_to_all": lambda: comm.Alltoall(x, out),
            "barrier": comm.Barrier,
            "all_gather_object": lambda: comm.allgather(arrays.text),
        }[verb]


def can_start_ranks() -> bool:
    """Whether mpirun is there to start them."""
    return shutil.which("mpirun") is not None
