"""Measure what moves tensors here: links, the all-reduce of all ranks, compressors, kernels, or a training step."""
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

from pyfleet.benchmarks.base import MAX_REPS, MIN_REPS, Ranks
from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import nearest
from pyfleet.errors import ConfigError, FleetError
from pyfleet.launchers.base import Job
from pyfleet.launchers.local import LocalLauncher
from pyfleet.placement import placement

SIZES = {"bandwidth": "1MB,10MB,50MB,100MB", "allreduce": "4B,64KB,1MB,25MB,100MB", "compression": "25MB",
         "kernels": "256KB,64MB", "step": "1MB,16MB"}
ONE_PROCESS = ("compression", "kernels")
UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}        # as in torch's bucket sizes
BOUND_BYTES = 64 << 20  # above every cache
BOUND_S = 0.2           # of plain sockets: what they need to find their speed is a small part of it
TRIAL_BYTES = 1 << 20
GLOO_TIMEOUT_S = 60
EPILOG = """sizes are bytes of an array (step: of the model's parameters), KB, MB and GB powers of 1024; GB/s is 10^9 bytes. Where a launcher (torchrun, or RANK,
WORLD_SIZE, MASTER_ADDR on every host) has placed this process among others, those are measured, over the links between them."""


def main(argv: list[str] | None = None, prog: str = "pyfleet benchmark") -> int:
    """The `pyfleet benchmark` command."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _options(argv, prog)
        if options.kind in ONE_PROCESS:
            measure = _kernels if options.kind == "kernels" else _compression
            return _show(measure(options), options)
        if placement().world_size == 1:
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


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or not int(match[1]) or int(match[1]) * UNITS[match[2].upper()] % 4:
        raise Refused(f"--sizes must be bytes such as 4B, 64KB or 25MB, multiples of 4, got {text.strip()!r}")
    return int(match[1]) * UNITS[match[2].upper()]


# ---- on a rank ----------------------------------------------------------------------------------------------------------


def _as_rank(options: Any) -> int:
    from pyfleet.fleet import shutdown
    ranks = Ranks()
    with contextlib.ExitStack() as stack:
        sockets = None if ranks.by_memory or options.kind == "step" else stack.enter_context(_sockets(ranks))
        told = {"bandwidth": _bandwidth, "allreduce": _all_reduce, "step": _step}[options.kind](options, ranks, sockets)
        ranks.barrier()
    shutdown()
    return _show(told, options) if ranks.rank == 0 else 0


class _Sockets:
    """Plain connections in a ring: what the link could carry."""

    def __init__(self, to_next: socket.socket, from_previous: socket.socket):
        self.to_next, self.from_previous = to_next, from_previous
        self.data, self.room = (np.ones(BOUND_BYTES, np.uint8) for _ in range(2))

    def enough(self, ranks: Ranks) -> int:
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
def _sockets(ranks: Ranks) -> Iterator[_Sockets]:
    from pyfleet.wiring import own_addresses
    address = own_addresses(ranks.fleet.cluster.iface)[0] if ranks.num_hosts > 1 else "127.0.0.1"
    with socket.create_server((address, 0)) as listener:
        places = ranks.tell(f"{address}:{listener.getsockname()[1]}")
        host, _, port = places[(ranks.rank + 1) % ranks.size].rpartition(":")
        with socket.create_connection((host, int(port)), 30) as to_next, listener.accept()[0] as from_previous:
            for sock in (to_next, from_previous):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield _Sockets(to_next, from_previous)


def _bandwidth(options: Any, ranks: Ranks, sockets: _Sockets | None) -> dict:
    """Each rank and the next one, both ways: send, and the receiver's 4-byte answer ends the clock, less half a round trip."""
    word, links = np.zeros(1, np.float32), _links(ranks.size)
    latency_s = {link: statistics.median(ranks.samples(lambda link=link: _answered(ranks, word, word, *link))[0]) / 2
                 for link in links}
    before, rows = {link: _plain_rate(ranks, sockets, *link) for link in links}, []
    for num_bytes in options.sizes:
        x = np.zeros(num_bytes // 4, np.float32)
        for link in links:
            def one_way(x: np.ndarray = x, link: tuple[int, int] = link) -> float:
                elapsed = _answered(ranks, x, word, *link)
                return max(1e-9, elapsed - latency_s[link]) if ranks.rank == link[0] else 0.0
            (seconds,) = ranks.samples(one_way)
            rows.append({"size": num_bytes, "from": link[0], "to": link[1], "seconds": seconds, **_wrapping(x),
                         "bytes_per_s": num_bytes / statistics.median(seconds)})
    after = {link: _plain_rate(ranks, sockets, *link) for link in links}
    for row in rows:        # the better of both ends of the run is nearer to what the machine can do
        link = row["from"], row["to"]
        row |= {"bound_bytes_per_s": max(before[link], after[link]), "latency_s": latency_s[link]}
    return _record("bandwidth", ranks) | {"latency_s": max(latency_s.values()), "rows": rows}


def _links(num_ranks: int) -> list[tuple[int, int]]:
    """(from, to) of every rank and the next one, both ways; of two ranks there is one pair."""
    pairs = [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]
    return list(dict.fromkeys(link for a, b in pairs for link in ((a, b), (b, a))))


def _answered(ranks: Ranks, x: np.ndarray, word: np.ndarray, source: int, target: int) -> float:
    """Seconds until target's answer to x is back at source; 0 on the other ranks."""
    from pyfleet.collectives import recv, send
    start = time.perf_counter()
    if ranks.rank == source:
        send(x, target)
        recv(word, target)
        return time.perf_counter() - start
    if ranks.rank == target:
        recv(x, source)
        send(word, source)
    return 0.0


def _wrapping(x: np.ndarray) -> dict[str, float]:
    """Seconds to make an array ready for the wire and to get it back from there: it is sent from where it lies.

    Ready: its note for the receiver, and a hold on its memory. Back: reading the note, holding the memory it is to fill.
    """
    from pyfleet.arrays import check_shape, describe, hold
    from pyfleet.engines.base import to_json
    taken: dict[str, list[float]] = {"serialize_s": [], "deserialize_s": []}
    for _ in range(MIN_REPS):
        start = time.perf_counter()
        note, _ = to_json(describe(x)), hold(x, writable=False)
        ready = time.perf_counter()
        check_shape(json.loads(note)["shape"])
        _, bring_back = hold(x)
        if bring_back is not None:
            bring_back()
        taken["serialize_s"].append(ready - start)
        taken["deserialize_s"].append(time.perf_counter() - ready)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _plain_rate(ranks: Ranks, sockets: _Sockets | None, source: int, target: int) -> float:
    """Bytes per second from one rank to a neighbour without pyfleet: over a plain socket, or a copy where memory is shared."""
    if sockets is None:
        data, copy = np.ones(BOUND_BYTES, np.uint8), np.zeros(BOUND_BYTES, np.uint8)
        return BOUND_BYTES / min(ranks.samples(lambda: np.copyto(copy, data) if ranks.rank == source else None)[0])
    num_bytes = sockets.enough(ranks)
    forward = target == (source + 1) % ranks.size       # over the connection that source made; else over target's

    def one_way() -> float:
        start = time.perf_counter()
        if ranks.rank == source:
            sock = sockets.to_next if forward else sockets.from_previous
            sock.sendall(memoryview(sockets.data)[:num_bytes])
            sockets.receive(sock, 1)
            return time.perf_counter() - start
        if ranks.rank == target:
            sock = sockets.from_previous if forward else sockets.to_next
            sockets.receive(sock, num_bytes)
            sock.sendall(b".")
        return 0.0
    return num_bytes / min(ranks.samples(one_way)[0])


def _step(options: Any, ranks: Ranks, sockets: None) -> dict:
    from pyfleet.benchmarks import step
    return _record("step", ranks) | {"batch": step.BATCH, "bound": "the same step without sending",
                                     "rows": step.measure(ranks, options.sizes)}


def _compression(options: Any) -> dict:
    from pyfleet.benchmarks import compression
    return {"benchmark": "compression", "ranks": 1, "hosts": 1, "path": "one thread", "bound": "none, which copies",
            "rows": compression.measure(options.sizes)}


def _all_reduce(options: Any, ranks: Ranks, sockets: _Sockets | None) -> dict:
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


def _all_reduce_bound(ranks: Ranks, sockets: _Sockets | None) -> float:
    """Bytes of array per second that memory or plain sockets leave to an all-reduce."""
    if sockets is not None:     # 2(N-1)/N of the array each way (Patarasuk and Yuan 2009)
        num_bytes = sockets.enough(ranks)
        each_way = num_bytes / min(ranks.samples(lambda: sockets.pass_on(num_bytes))[0])
        return each_way * ranks.size / (2 * (ranks.size - 1))
    x = np.ones(BOUND_BYTES // 4, np.float32)
    return BOUND_BYTES / min(ranks.samples(lambda: _rewrite(x))[0])


def _rewrite(x: np.ndarray) -> None:
    np.negative(x, out=x)       # reads and writes all of it, as an all-reduce in place does; ranks do it at once


def _demand_right(name: str, x: np.ndarray, call: Callable[[], None], ranks: Ranks) -> None:
    """Raises FleetError, on every rank, when a system does not sum right; leaves zeros, which stay zeros."""
    ramp = (np.arange(x.size) % 1021).astype(np.float32)        # sums of small integers are exact
    x[:] = ramp * (ranks.rank + 1)
    call()
    if ranks.most(float(np.any(x != ramp * (ranks.size * (ranks.size + 1) // 2)))):
        raise FleetError(f"{name}: WRONG SUM of {x.nbytes} bytes")
    x[:] = 0


def _gloo(ranks: Ranks) -> Callable[[np.ndarray], Callable[[], None]]:
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


def _record(kind: str, ranks: Ranks) -> dict:
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
    lines = {"compression": _compression_lines, "step": _step_lines}.get(told["benchmark"], _rate_lines)(told)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip())
    return 0


def _rate_lines(told: dict) -> list[list[str]]:
    """Header and rows of what has a rate and a bound."""
    name = {"bandwidth": "link", "allreduce": "system", "kernels": "kernel"}[told["benchmark"]]
    wrapping = {"serialize_s": "ser ms", "deserialize_s": "de ms"} if told["benchmark"] == "bandwidth" else {}
    lines = [["size", name, "min ms", "median ms", "max ms", "GB/s", *wrapping.values(), "bound GB/s", "of bound"]]
    for row in told["rows"]:
        lines.append([
            _human(row["size"]), row.get("system") or f"{row['from']} -> {row['to']}", *_times(row["seconds"]),
            f"{row['bytes_per_s'] / 1e9:.3g}", *(f"{1e3 * row[key]:.2g}" for key in wrapping),
            f"{row['bound_bytes_per_s'] / 1e9:.3g}", f"{100 * row['bytes_per_s'] / row['bound_bytes_per_s']:.0f} %"])
    return lines


def _times(seconds: list[float]) -> list[str]:
    return [f"{1e3 * each:.4g}" for each in (min(seconds), statistics.median(seconds), max(seconds))]


def _compression_lines(told: dict) -> list[list[str]]:
    """Rates are of float32 bytes; overhead is what encoding and decoding take together."""
    lines = [["size", "method", "of float32", "error", "encode GB/s", "decode GB/s", "feedback GB/s", "overhead ms"]]
    for row in told["rows"]:
        median = {key: statistics.median(row[key]) for key in ("encode_s", "decode_s", "feedback_s") if row[key]}
        rates = [f"{row['size'] / median[key] / 1e9:.3g}" if key in median else "-" for key in ("encode_s", "decode_s", "feedback_s")]
        lines.append([_human(row["size"]), row["system"], f"{100 * row['encoded_bytes'] / row['size']:.2f} %",
                      f"{row['error']:.2g}", *rates, f"{1e3 * (median['encode_s'] + median['decode_s']):.3g}"])
    return lines


def _step_lines(told: dict) -> list[list[str]]:
    """Waiting is what a step takes longer than the same one without sending; communication is mostly hidden by backward."""
    lines = [["parameters", "ranks", "min ms", "median ms", "max ms", "samples/s", "compute ms", "communication ms", "waiting ms",
              "of bound", "of linear"]]
    for row in told["rows"]:
        whole, compute, communication = (statistics.median(row[key]) for key in ("seconds", "compute_s", "communication_s"))
        lines.append([f"{row['size'] / 1e6:.3g} MB", str(row["ranks"]), *_times(row["seconds"]), f"{row['samples_per_s']:,.0f}",
                      f"{1e3 * compute:.4g}", f"{1e3 * communication:.4g}", f"{1e3 * max(0.0, whole - compute):.4g}",
                      f"{100 * compute / whole:.0f} %", f"{100 * row['efficiency']:.0f} %"])
    return lines


def _human(num_bytes: int) -> str:
    unit = next(unit for unit in ("GB", "MB", "KB", "B") if num_bytes % UNITS[unit] == 0)
    return f"{num_bytes // UNITS[unit]} {unit}"
