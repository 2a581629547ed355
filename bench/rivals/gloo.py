"""torch.distributed over gloo."""
from __future__ import annotations

import datetime
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.systems import TIMEOUT_S, Ordinary
from bench.verbs import ROOT, Arrays, Party


class Gloo(Ordinary):
    """gloo over TCP (it knows no shared memory), in place on a torch tensor.

    Between hosts GLOO_SOCKET_IFNAME names the interface; on one host it is the loopback one.
    """

    bound = "tcp"

    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=TIMEOUT_S))

    def call(self, handle: Any) -> None:
        dist.all_reduce(handle)

    def close(self) -> None:
        dist.destroy_process_group()


class GlooVerbs(Party):
    """gloo's verbs, on tensors over the same memory as the arrays; lists of parts are made before the clock runs."""

    bound = "tcp"
    start, close = Gloo.start, Gloo.close

    def ready(self, verb: str, arrays: Arrays) -> Callable[[], Any]:
        x, out = (None if each is None else torch.from_numpy(each) for each in (arrays.x, arrays.out))
        size, rank = arrays.size, arrays.rank
        if verb == "all_gather_object":
            texts: list = [None] * size
            return lambda: dist.all_gather_object(texts, arrays.text) or texts
        if verb in ("round_trip", "one_way"):
            return self._message(verb, rank, x)
        into = list(out.chunk(size)) if verb == "gather" and rank == ROOT else None
        given = list(x.chunk(size)) if verb == "scatter" and rank == ROOT else None
        # Other names for the same from torch 2.13 on.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        return {
            "all_reduce": lambda: dist.all_reduce(x),
            "reduce": lambda: dist.reduce(x, ROOT),
            "broadcast": lambda: dist.broadcast(x, ROOT),
            "all_gather": lambda: all_gather(out, x),
            "gather": lambda: dist.gather(x, into, ROOT),
            "scatter": lambda: dist.scatter(out, given, ROOT),
            "reduce_scatter": lambda: reduce_scatter(out, x),
            "all_to_all": lambda: dist.all_to_all_single(out, x),
            "barrier": dist.barrier,
        }[verb]

    def _message(self, verb: str, rank: int, x: torch.Tensor | None) -> Callable[[], Any]:
        calls = {0: [lambda: dist.send(x, 1), lambda: dist.recv(x, 1)], 1: [lambda: dist.recv(x, 0), lambda: dist.send(x, 0)]}
        first, second = calls.get(rank, [lambda: None] * 2)
        return first if verb == "one_way" else lambda: [first(), second()]
