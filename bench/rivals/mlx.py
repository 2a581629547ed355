"""MLX distributed over its ring backend, on the CPU."""
from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import time
from typing import Any

import mlx.core as mx
import numpy as np

from bench.systems import TIMEOUT_S, System


class Mlx(System):
    """all_sum into a new array (MLX arrays are values: there is no in place), evaluated at once; TCP on loopback."""

    bound = "tcp"

    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        mx.set_default_device(mx.cpu)
        hosts = folder / "hosts.json"
        if rank == 0:
            (folder / "hosts.new").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(size)]))
            os.replace(folder / "hosts.new", hosts)
        deadline = time.monotonic() + TIMEOUT_S
        while not hosts.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 wrote no hostfile")
            time.sleep(0.01)
        os.environ |= {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
        self._group = mx.distributed.init(strict=True, backend="ring")
        if self._group.size() != size:
            raise RuntimeError(f"the ring has {self._group.size()} of {size} ranks")

    def array(self, num_elems: int) -> Any:
        return [mx.zeros(num_elems, dtype=mx.float32), None]    # [argument, sum]

    def write(self, handle: Any, values: np.ndarray) -> None:
        handle[0], handle[1] = mx.array(values), None
        mx.eval(handle[0])

    def call(self, handle: Any) -> None:
        handle[1] = mx.distributed.all_sum(handle[0], group=self._group, stream=mx.cpu)
        mx.eval(handle[1])

    def read(self, handle: Any) -> np.ndarray:
        return np.array(handle[1])

    def close(self) -> None:
        """MLX keeps its ring until the process ends."""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in taken:
            port.bind(("127.0.0.1", 0))
        return [port.getsockname()[1] for port in taken]
