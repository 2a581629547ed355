"""The systems that benchmarks compare: the contract of an adapter, our own data paths, and the table of all.

All that this suite expects of pyfleet is in this file.
"""
from __future__ import annotations

import importlib
import pathlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

SYSTEMS = {
    "arena": "bench.systems:Arena",
    "ordinary": "bench.systems:Ordinary",
    "numpy": "bench.systems:Numpy",
    "tcp": "bench.systems:Tcp",
    "secure": "bench.systems:Secure",
    "fleet": "bench.systems:Hosts",
    "ring": "bench.systems:Ring",
    "direct": "bench.systems:Direct",
    "fp16": "bench.systems:Fp16",
    "int8": "bench.systems:Int8",
    "topk": "bench.systems:TopK",
    "auto": "bench.systems:Auto",
    "gloo": "bench.rivals.gloo:Gloo",
    "mpi": "bench.rivals.mpi:Mpi",
    "mlx": "bench.rivals.mlx:Mlx",
}
FLEET = ("arena", "ordinary", "numpy", "tcp")       # on one host, what runs when nobody says which; "secure" on demand
HOSTS = ("fleet", "ring", "direct")                 # the same between hosts; "fp16", "int8", "topk" and "auto" on demand
RIVALS = ("gloo", "mpi", "mlx")
TIMEOUT_S = 60.0


class System(ABC):
    """One way to sum float32 arrays over the ranks. Every rank makes the same calls in the same order.

    A handle is whatever the system reduces; only its own methods look inside.
    """

    bound: ClassVar[str]                    # what limits it in the end: "memory" or "tcp" (see bench.bounds)
    largest: ClassVar[int | None] = None    # bytes above which a row would say nothing new
    tolerance: ClassVar[float] = 0.0        # of the largest sum: how far a sum may be off

    @abstractmethod
    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        """Meet the other ranks, with folder (shared, empty) as the meeting place.

        Raises:  anything, with a reason worth printing, when this system cannot run here.
        """

    @abstractmethod
    def array(self, num_elems: int) -> Any:
        """The handle of a new float32 array, in the memory this system likes best."""

    @abstractmethod
    def write(self, handle: Any, values: np.ndarray) -> None:
        """Make values the content."""

    @abstractmethod
    def call(self, handle: Any) -> None:
        """Sum over all ranks, complete on return: the timed call, written as a user of the system would write it."""

    @abstractmethod
    def read(self, handle: Any) -> np.ndarray:
        """The sum that the last call made."""

    @abstractmethod
    def close(self) -> None:
        """Leave. Called once, after a start that succeeded."""


def create(name: str) -> System:
    """A new adapter of a system; raises ImportError where what it adapts is not installed."""
    module, _, kind = SYSTEMS[name].partition(":")
    return getattr(importlib.import_module(module), kind)()


class _InPlace(System):
    """Handles are arrays that numpy can look at, and the sum replaces the content."""

    def write(self, handle: Any, values: np.ndarray) -> None:
        np.copyto(np.asarray(handle), values)

    def read(self, handle: Any) -> np.ndarray:
        return np.asarray(handle)


class _Fleet(_InPlace):
    """pyfleet over one transport. Kinds of memory over the same transport share one engine in each process."""

    transport: ClassVar[str]
    encryption: ClassVar[str] = "off"
    _engines: ClassVar[dict[tuple[str, str], list]] = {}    # (transport, encryption) -> [engine, adapters that use it]

    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        import pyfleet
        from pyfleet.config import ClusterConfig
        from pyfleet.fleet import open_engine
        from pyfleet.placement import Placement

        key = self.transport, self.encryption
        if key not in self._engines:
            place = Placement(rank, size, rendezvous=f"file://{folder}", source="bench")
            engine, _ = open_engine(place, ClusterConfig(transport=self.transport, encryption=self.encryption), TIMEOUT_S)
            self._engines[key] = [engine, 0]
        self._engines[key][1] += 1
        self.engine = self._engines[key][0]
        self._all_reduce = self.engine.all_reduce
        if self.transport == "shm":
            # What users call. A process has one engine in force, so the other transports' engines are called directly.
            pyfleet.engines.set_current(self.engine)
            self._all_reduce = pyfleet.all_reduce

    def call(self, handle: Any) -> None:
        self._all_reduce(handle)

    def close(self) -> None:
        shared = self._engines[self.transport, self.encryption]
        shared[1] -= 1
        if shared[1] == 0:
            del self._engines[self.transport, self.encryption]
            self.engine.close()


class Arena(_Fleet):
    """Shared memory; the tensor lies in the arena: nothing is copied."""

    transport = "shm"
    bound = "memory"

    def array(self, num_elems: int) -> Any:
        import pyfleet
        return pyfleet.empty(num_elems)


class Ordinary(_Fleet):
    """Shared memory; the tensor lies wherever torch put it."""

    transport = "shm"
    bound = "memory"

    def array(self, num_elems: int) -> Any:
        import torch
        return torch.empty(num_elems, dtype=torch.float32)


class Numpy(_Fleet):
    """Shared memory; a numpy array, for what the look at the argument costs: small sizes only."""

    transport = "shm"
    bound = "memory"
    largest = 64 << 10

    def array(self, num_elems: int) -> Any:
        return np.empty(num_elems, np.float32)


class Tcp(Ordinary):
    """TCP over the loopback interface, as between hosts, in the clear as the rivals are."""

    transport = "tcp"
    bound = "tcp"


class Secure(Tcp):
    """TCP over the loopback interface, encrypted as between hosts by default."""

    encryption = "on"


class Hosts(Ordinary):
    """Whatever a user on several hosts gets, in the clear as the rivals are."""

    transport = "auto"
    bound = "tcp"


class Ring(Hosts):
    """The ring over links."""

    def call(self, handle: Any) -> None:
        self._all_reduce(handle, algorithm="ring")


class Direct(Hosts):
    """Everyone to everyone over links."""

    def call(self, handle: Any) -> None:
        self._all_reduce(handle, algorithm="direct")


@dataclass
class Bucket:
    """A tensor that is reduced in compressed form, step after step; and what it holds before each, where that matters."""

    values: Any
    way: Any
    source: np.ndarray | None = None


class Int8(Hosts):
    """As in training: the mean, compressed, with error feedback."""

    compression: ClassVar[str] = "int8"
    tolerance = 0.01            # half a step of 1/127, of each rank's array and of the sum
    refills: ClassVar[bool] = False

    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        super().start(rank, size, folder)
        self._rng = np.random.default_rng(rank)

    def array(self, num_elems: int) -> Any:
        from pyfleet.routes import CompressedAllReduce

        way = CompressedAllReduce(self.engine, self.compression, num_elems, "mean")
        return Bucket(super().array(num_elems), way)

    def write(self, handle: Any, values: np.ndarray) -> None:
        """As said, but normal numbers for zeros: of zeros there is nothing to choose, and nothing to pack."""
        if not values.any():
            values = self._rng.standard_normal(values.size, np.float32)
            handle.source = values if self.refills else None
        super().write(handle.values, values)

    def call(self, handle: Any) -> None:
        if handle.source is not None:
            np.copyto(np.asarray(handle.values), handle.source)
        handle.way.all_reduce(handle.values)

    def read(self, handle: Any) -> np.ndarray:
        return super().read(handle.values) * np.float32(self.engine.world_size)


class Fp16(Int8):
    """As in training, in half as many bytes."""

    compression = "fp16"
    tolerance = 0.001


class TopK(Int8):
    """As in training, the largest hundredth; what is summed is new in each call, and the copy of it is timed, too."""

    compression = "topk(ratio=0.01)+fp16"
    tolerance = 1.0
    refills = True


class Auto(Int8):
    """As in training, whatever "auto" stands for."""

    def array(self, num_elems: int) -> Any:
        from pyfleet.routes import CompressedAllReduce, chosen

        name = chosen(self.engine, num_elems).compression
        way = _Dense(self._all_reduce) if name == "none" else CompressedAllReduce(self.engine, name, num_elems, "mean")
        return Bucket(Hosts.array(self, num_elems), way)


class _Dense:
    """What DistributedDataParallel does with a bucket that is not compressed."""

    def __init__(self, all_reduce: Any):
        self._all_reduce = all_reduce

    def all_reduce(self, values: Any) -> None:
        self._all_reduce(values, "mean")
