"""torch.distributed over gloo."""
from __future__ import annotations

import datetime
import os
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist

from bench.systems import TIMEOUT_S, Ordinary


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
