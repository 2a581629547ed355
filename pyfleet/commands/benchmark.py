"""Measure what moves tensors here: the link between two ranks, the all-reduce of all ranks, or the kernels."""
from __future__ import annotations

import contextlib
import json
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import nearest
from pyfleet.errors import ConfigError, FleetError
from pyfleet.launchers.base import Job
from pyfleet.launchers.local import LocalLauncher
from pyfleet.placement import placement

SIZES = {"bandwidth": "1MB,10MB,50MB,100MB", "allreduce": "4B,64KB,1MB,25MB,100MB", "kernels": "256KB,64MB"}
UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}        # as in torch's bucket sizes
ROW_S = 1.0             # what the samples of one row may take
MIN_REPS, MAX_REPS = 5, 200
SAMPLE_S = 2e-4         # a sample lasts at least so long: ranks leave a barrier microseconds apart
MAX_REPEATS = 200
BOUND_BYTES = 64 << 20  # above every cache
BOUND_S = 0.2           # of plain sockets: what they need to find their speed is a small part of it
TRIAL_BYTES = 1 << 20
GLOO_TIMEOUT_S = 60
EPILOG = """sizes are bytes of an array, KB, MB and GB powers of 1024; GB/s is 10^9 bytes. Where a launcher (torchrun, or RANK,
WORLD_SIZE, MASTER_ADDR on every host) has placed this process among others, those are measured, over the links between them."""


def main(argv: list[str] | None = None, prog: str = "pyfleet benchmark") -> int:
    """The `pyfleet benchmark` command."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _options(argv, prog)
        if options.kind == "kernels":
            return _show(_kernels(options), options)
        if placement().world_size == 1:
            _demand_pair(options, options.nproc)
            return LocalLauncher().run(Job((sys.executable, "-m", "pyfleet", "benchmark", *argv), options.nproc, prefix=False))
        return _as_rank(options)
    except (Refused, ConfigError) as error:
        return refuse(prog, error)
    except FleetError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1


def _options(argv: list[str], prog: str) -> Any:
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG, usage=f"{prog} {'|'.join(SIZES)} [options]")
    add = parser.add_argument
    add("--nproc", "-n", type=int, default=2, metavar="N", help="ranks to start here (default: 2)")
    add("--sizes", metavar="A,B", help="such as 64KB,25MB")
    add("--rivals", action="store_true", help="measure gloo (all-reduce), or torch and numpy (kernels), too")
    add("--json", action="store_true", help="one JSON object, with every sample, instead of a table")
    kind, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    mine, more = parser.split(rest)
    options = parser.parse_args(mine)
    if kind not in SIZES or more:
        word = more[0] if kind in SIZES else kind
        raise Refused("what is to be measured: " + ", ".join(SIZES) if word is None
                      else f"cannot measure {word!r}{nearest(word, SIZES) or ': one of ' + ', '.join(SIZES)}")
    options.kind, options.sizes = kind, [_bytes(text) for text in (options.sizes or SIZES[kind]).split(",")]
    if not 2 <= options.nproc <= 1 << 10:
        raise Refused(f"--nproc must be a number >= 2, got {options.nproc}")
    return options


def _demand_pair(options: Any, num_ranks: int) -> None:
    if options.kind == "bandwidth" and num_ranks != 2:
        raise Refused(f"bandwidth is measured between two ranks, and there are {num_ranks}")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or not int(match[1]) or int(match[1]) * UNITS[match[2].upper()] % 4:
        raise Refused(f"--sizes must be bytes such as 4B, 64KB or 25MB, multiples of 4, got {text.strip()!r}")
    return int(match[1]) * UNITS[match[2].upper()]


# ---- on a rank ----------------------------------------------------------------------------------------------------------


class _Ranks:
    """What the ranks of a benchmark need of each other: to start together, and to tell each other numbers."""

    def __init__(self) -> None:
        from pyfleet import collectives, fleet
        self.fleet = fleet.init()
        self.rank, self.size = self.fleet.rank, self.fleet.world_size
        self.barrier, self.all_reduce, self.broadcast = collectives.barrier, collectives.all_reduce, collectives.broadcast
        self.by_memory = self.fleet.engine.group.domain is not None
        self.num_hosts = len({member.host for member in self.fleet.members})

    def most(self, value: float) -> float:
        """The greatest of all ranks' values, on every rank."""
        word = np.array([value])
        self.all_reduce(word, "max")
        return float(word[0])

    def tell(self, text: str) -> list[str]:
        """Every rank's text, of 100 bytes at most."""
        room = np.zeros((self.size, 100), np.uint8)
        room[self.rank, :len(text)] = np.frombuffer(text.encode(), np.uint8)
        self.all_reduce(room)
        return [bytes(row).rstrip(b"\0").decode() for row in room]

    def samples(self, *calls: Callable[[], float | None]) -> list[list[float]]:
        """Seconds that the slowest rank took for each call, in turns; a call may return what it measured itself."""
        taken: list[list[float]] = [[] for _ in calls]
        repeats, reps, rep = [1] * len(calls), 0, -2        # the first turn connects, maps and learns; the second one plans
        while rep <= reps:
            for call, repeat, seconds in zip(calls, repeats, taken, strict=True):
                self.barrier()
                start = time.perf_counter()
                for _ in range(repeat):
                    measured = call()
                elapsed = (time.perf_counter() - start) / repeat if measured is None else measured
                seconds.append(self.most(elapsed))
            if rep == -1:
                planned = [each.pop() for each in taken]
                taken = [[] for _ in calls]
                repeats = [max(1, min(MAX_REPEATS, int(SAMPLE_S / max(1e-9, each)))) for each in planned]
                turn_s = sum(each * repeat for each, repeat in zip(planned, repeats, strict=True))
                reps = max(MIN_REPS, min(MAX_REPS, int(ROW_S * len(calls) / max(1e-9, turn_s))))
            rep += 1
        return taken


def _as_rank(options: Any) -> int:
    from pyfleet.fleet import shutdown
    ranks = _Ranks()
    with contextlib.ExitStack() as stack:
        sockets = None if ranks.by_memory else stack.enter_context(_sockets(ranks))
        told = (_bandwidth if options.kind == "bandwidth" else _all_reduce)(options, ranks, sockets)
        ranks.barrier()
    shutdown()
    return _show(told, options) if ranks.rank == 0 else 0


class _Sockets:
    """Plain connections in a ring: what the link could carry."""

    def __init__(self, to_next: socket.socket, from_previous: socket.socket):
        self.to_next, self.from_previous = to_next, from_previous
        self.data, self.room = (np.ones(BOUND_BYTES, np.uint8) for _ in range(2))

    def enough(self, ranks: _Ranks) -> int:
        """How much to pass on so that it takes BOUND_S, at most all there is."""
        seconds = ranks.samples(lambda: self.pass_on(TRIAL_BYTES))[0]
        return max(TRIAL_BYTES, min(BOUND_BYTES, int(TRIAL_BYTES * BOUND_S / min(seconds))))

    def receive(self, sock: socket.socket, num_bytes: int) -> None:
        """Take exactly so many bytes."""
        view = memoryview(self.room)[:num_bytes]
        while view:
            if not (got := sock.recv_into(view)):
                raise ConnectionError("a rank hung up while plain sockets were measured")
            view = view[got:]

    def pass_on(self, num_bytes: int) -> None:
        """Send to the next rank while receiving from the previous one."""
        sender = threading.Thread(target=self.to_next.sendall, args=(memoryview(self.data)[:num_bytes],))
        sender.start()
        self.receive(self.from_previous, num_bytes)
        sender.join()


@contextlib.contextmanager
def _sockets(ranks: _Ranks) -> Iterator[_Sockets]:
    from pyfleet.wiring import own_addresses
    address = own_addresses(ranks.fleet.cluster.iface)[0] if ranks.num_hosts > 1 else "127.0.0.1"
    with socket.create_server((address, 0)) as listener:
        places = ranks.tell(f"{address}:{listener.getsockname()[1]}")
        host, _, port = places[(ranks.rank + 1) % ranks.size].rpartition(":")
        with socket.create_connection((host, int(port)), 30) as to_next, listener.accept()[0] as from_previous:
            for sock in (to_next, from_previous):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield _Sockets(to_next, from_previous)


def _bandwidth(options: Any, ranks: _Ranks, sockets: _Sockets | None) -> dict:
    """One way and the other between two ranks: the receiver's 4-byte answer ends the clock, less half a round trip of such."""
    _demand_pair(options, ranks.size)
    word, (latency,) = np.zeros(1, np.float32), ranks.samples(lambda: _both_ways(ranks))
    latency_s = statistics.median(latency) / 2
    before, rows = [_plain_rate(ranks, sockets, source) for source in range(2)], []
    for num_bytes in options.sizes:
        x = np.zeros(num_bytes // 4, np.float32)
        for source in range(2):
            def one_way(x: np.ndarray = x, source: int = source) -> float:
                start = time.perf_counter()
                ranks.broadcast(x, source)
                ranks.broadcast(word, 1 - source)
                return max(1e-9, time.perf_counter() - start - latency_s) if ranks.rank == source else 0.0
            (seconds,) = ranks.samples(one_way)
            rows.append({"size": num_bytes, "from": source, "to": 1 - source, "seconds": seconds, **_wrapping(x),
                         "bytes_per_s": num_bytes / statistics.median(seconds)})
    after = [_plain_rate(ranks, sockets, source) for source in range(2)]
    for row in rows:        # the better of both ends of the run is nearer to what the machine can do
        row["bound_bytes_per_s"] = max(before[row["from"]], after[row["from"]])
    return _record("bandwidth", ranks) | {"latency_s": latency_s, "rows": rows}


def _both_ways(ranks: _Ranks) -> None:
    word = np.zeros(1, np.float32)
    ranks.broadcast(word, 0)
    ranks.broadcast(word, 1)


def _wrapping(x: np.ndarray) -> dict[str, float]:
    """Seconds to make an array ready for the wire and to get it back from there: it is sent from where it lies."""
    from pyfleet.arrays import hold
    start = time.perf_counter()
    _, bring_back = hold(x)
    ready = time.perf_counter()
    if bring_back is not None:
        bring_back()
    return {"serialize_s": ready - start, "deserialize_s": time.perf_counter() - ready}


def _plain_rate(ranks: _Ranks, sockets: _Sockets | None, source: int) -> float:
    """Bytes per second from one rank to the other without pyfleet: over a plain socket, or a copy where memory is shared."""
    if sockets is None:
        data, copy = np.ones(BOUND_BYTES, np.uint8), np.zeros(BOUND_BYTES, np.uint8)
        return BOUND_BYTES / min(ranks.samples(lambda: np.copyto(copy, data) if ranks.rank == source else None)[0])
    num_bytes = sockets.enough(ranks)

    def one_way() -> float:
        start = time.perf_counter()
        # Rank r receives on from_previous what came over to_next of the other one; with two ranks both are its peer.
        if ranks.rank == source:
            sockets.to_next.sendall(memoryview(sockets.data)[:num_bytes])
            sockets.receive(sockets.from_previous, 1)
            return time.perf_counter() - start
        sockets.receive(sockets.from_previous, num_bytes)
        sockets.to_next.sendall(b".")
        return 0.0
    return num_bytes / min(ranks.samples(one_way)[0])


def _all_reduce(options: Any, ranks: _Ranks, sockets: _Sockets | None) -> dict:
    """Every system in turns, every rank at once."""
    from pyfleet.collectives import empty
    bound = _all_reduce_bound(ranks, sockets)
    gloo = _gloo(ranks) if options.rivals else None
    rows = []
    for num_bytes in options.sizes:
        count = num_bytes // 4
        arrays = {"arena": empty(count, like="numpy"), "ordinary": np.empty(count, np.float32)}
        arrays = arrays if ranks.by_memory else {"links": arrays["ordinary"]}
        calls = {name: (lambda x=x: ranks.all_reduce(x)) for name, x in arrays.items()}
        if gloo:
            arrays["gloo"] = np.empty(count, np.float32)
            calls["gloo"] = gloo(arrays["gloo"])
        for name, call in calls.items():
            _demand_right(name, arrays[name], call, ranks)
        for name, seconds in zip(calls, ranks.samples(*calls.values()), strict=True):
            rows.append({"size": num_bytes, "system": name, "seconds": seconds,
                         "bytes_per_s": num_bytes / statistics.median(seconds)})
    bound = max(bound, _all_reduce_bound(ranks, sockets))
    return _record("allreduce", ranks) | {"rows": [row | {"bound_bytes_per_s": bound} for row in rows]}


def _all_reduce_bound(ranks: _Ranks, sockets: _Sockets | None) -> float:
    """Bytes of array per second that memory or plain sockets leave to an all-reduce."""
    if sockets is not None:     # 2(N-1)/N of the array each way (Patarasuk and Yuan 2009)
        num_bytes = sockets.enough(ranks)
        each_way = num_bytes / min(ranks.samples(lambda: sockets.pass_on(num_bytes))[0])
        return each_way * ranks.size / (2 * (ranks.size - 1))
    x = np.ones(BOUND_BYTES // 4, np.float32)
    return BOUND_BYTES / min(ranks.samples(lambda: _rewrite(x))[0])


def _rewrite(x: np.ndarray) -> None:
    np.negative(x, out=x)       # reads and writes all of it, as an all-reduce in place does; ranks do it at once


def _demand_right(name: str, x: np.ndarray, call: Callable[[], None], ranks: _Ranks) -> None:
    """Raises FleetError, on every rank, when a system does not sum right; leaves zeros, which stay zeros."""
    ramp = (np.arange(x.size) % 1021).astype(np.float32)        # sums of small integers are exact
    x[:] = ramp * (ranks.rank + 1)
    call()
    if ranks.most(float(np.any(x != ramp * (ranks.size * (ranks.size + 1) // 2)))):
        raise FleetError(f"{name}: WRONG SUM of {x.nbytes} bytes")
    x[:] = 0


def _gloo(ranks: _Ranks) -> Callable[[np.ndarray], Callable[[], None]]:
    """From an array to a call of torch's gloo that sums it in place, on the addresses that pyfleet uses."""
    import datetime

    import torch
    import torch.distributed as dist

    from pyfleet.wiring import own_addresses
    torch.set_num_threads(1)
    address = own_addresses(ranks.fleet.cluster.iface)[0] if ranks.num_hosts > 1 else "127.0.0.1"
    patience = datetime.timedelta(seconds=GLOO_TIMEOUT_S)
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience) if ranks.rank == 0 else None
    host, _, port = ranks.tell(f"{address}:{store.port if store else 0}")[0].rpartition(":")
    store = store or dist.TCPStore(host, int(port), is_master=False, timeout=patience)
    settings = dist.ProcessGroupGloo._Options()
    settings._devices, settings._timeout = [dist.ProcessGroupGloo.create_device(hostname=address)], patience
    group = dist.ProcessGroupGloo(store, ranks.rank, ranks.size, settings)

    def prepare(x: np.ndarray) -> Callable[[], None]:
        tensors = [torch.from_numpy(x)]
        return lambda: group.allreduce(tensors).wait() and None
    return prepare


def _record(kind: str, ranks: _Ranks) -> dict:
    return {"benchmark": kind, "ranks": ranks.size, "hosts": ranks.num_hosts,
            "path": "shared memory" if ranks.by_memory else "links over TCP",
            "bound": "a copy in memory" if ranks.by_memory and kind == "bandwidth"
            else "rewriting the array in place" if ranks.by_memory else "plain sockets"}


# ---- kernels ------------------------------------------------------------------------------------------------------------


def _kernels(options: Any) -> dict:
    """One thread, per kernel: bytes read and written per second, beside those of a copy in memory."""
    from fleetcore.errors import DType, ReduceOp
    from fleetcore.kernels import cast, checksum, reduce
    rows = []
    for num_bytes in options.sizes:
        a, b, out = (np.full(num_bytes // 4, value, np.float32) for value in (1.0, 2.0, 0.0))
        half = np.zeros(num_bytes // 4, np.uint16)
        raw = [each.view(np.uint8) for each in (a, b, out, half)]
        calls = {
            "copy": ("numpy", 2, lambda a=a, out=out: np.copyto(out, a)),
            "sum of two float32": (reduce.isa(), 3, lambda r=raw: reduce.reduce_arrays(
                [r[2]], r[:2], int(ReduceOp.SUM), int(DType.FLOAT32))),
            "float32 to float16": (cast.isa(), 1.5, lambda r=raw: cast.cast_array(r[3], int(DType.FLOAT16), r[0], int(DType.FLOAT32))),
            "float32 to bfloat16": (cast.isa(), 1.5, lambda r=raw: cast.cast_array(r[3], int(DType.BFLOAT16), r[0], int(DType.FLOAT32))),
            "crc32c": (checksum.isa(), 1, lambda r=raw: checksum.checksum(r[0])),
        }
        if options.rivals:
            calls |= _kernel_rivals(a, b, out)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for rep in range(1 + MIN_REPS + int(MAX_REPS * (num_bytes <= 1 << 20))):
            for name, (_, _, call) in calls.items():
                start = time.perf_counter()
                call()
                if rep:
                    taken[name].append(time.perf_counter() - start)
        bound = 2 * num_bytes / statistics.median(taken["copy"])
        rows += [{"size": num_bytes, "system": f"{name} ({by})", "seconds": taken[name], "bound_bytes_per_s": bound,
                  "bytes_per_s": moved * num_bytes / statistics.median(taken[name])} for name, (by, moved, _) in calls.items()]
    return {"benchmark": "kernels", "ranks": 1, "hosts": 1, "path": "one thread", "bound": "a copy in memory", "rows": rows}


def _kernel_rivals(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> dict[str, tuple]:
    import torch
    torch.set_num_threads(1)
    tensors = [torch.from_numpy(each) for each in (a, b, out)]
    narrow = torch.empty(a.size, dtype=torch.float16)
    return {"numpy.add": ("rival", 3, lambda: np.add(a, b, out=out)),
            "torch.add": ("rival", 3, lambda: torch.add(tensors[0], tensors[1], out=tensors[2])),
            "torch float16 copy_": ("rival", 1.5, lambda: narrow.copy_(tensors[0]))}


# ---- what is printed ----------------------------------------------------------------------------------------------------


def _show(told: dict, options: Any) -> int:
    if options.json:
        print(json.dumps(told))
        return 0
    who = f"{told['ranks']} ranks on {told['hosts']} host(s), " if told["ranks"] > 1 else ""
    print(f"{told['benchmark']}: {who}{told['path']}; the bound is {told['bound']}, measured here and now")
    if "latency_s" in told:
        print(f"latency of 4 bytes, one way: {1e6 * told['latency_s']:.1f} us")
    names = {"bandwidth": ["link"], "allreduce": ["system"], "kernels": ["kernel"]}[told["benchmark"]]
    wrapping = ["ser ms", "de ms"] if told["benchmark"] == "bandwidth" else []
    header = ["size", *names, "min ms", "median ms", "max ms", "GB/s", *wrapping, "bound GB/s", "of bound"]
    lines = [header]
    for row in told["rows"]:
        times = (min(row["seconds"]), statistics.median(row["seconds"]), max(row["seconds"]))
        lines.append([
            _human(row["size"]), row.get("system") or f"{row['from']} -> {row['to']}", *(f"{1e3 * t:.4g}" for t in times),
            f"{row['bytes_per_s'] / 1e9:.3g}", *(f"{1e3 * row[key]:.2g}" for key in ("serialize_s", "deserialize_s") if wrapping),
            f"{row['bound_bytes_per_s'] / 1e9:.3g}", f"{100 * row['bytes_per_s'] / row['bound_bytes_per_s']:.0f} %"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip())
    return 0


def _human(num_bytes: int) -> str:
    unit = next(unit for unit in ("GB", "MB", "KB", "B") if num_bytes % UNITS[unit] == 0)
    return f"{num_bytes // UNITS[unit]} {unit}"
