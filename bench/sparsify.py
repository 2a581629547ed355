"""Selection of the largest elements, index coding and sparse sums, beside torch and numpy, one thread."""
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.kernels import levels
from bench.report import Summary, human_ratio, human_time, machine, parse_list, summary, table
from fleetcore.kernels import indices, sparsify


def interleaved(calls: dict[str, Callable[[], object]], reps: int) -> dict[str, Summary]:
    """Seconds of every call, run in turns so that what else the machine does hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for rep in range(reps + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if rep:                     # the first round touches the memory
                samples[name].append(time.perf_counter() - start)
    return {name: summary(times) for name, times in samples.items()}


def entropy_bits(n: int, k: int) -> float:
    """Bits per index that no code for k of n can beat on average: log2 C(n, k) / k."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / k


def cases(n: int, k: int) -> Iterator[tuple[str, int, dict[str, Callable[[], object]]]]:
    """(what, bytes that must move at least, calls): ours first, by instruction set, then rivals."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(n, dtype=np.float32)
    tensor, room = torch.from_numpy(x), sparsify.room_for(n, k)
    chosen, values = np.zeros(room, np.uint32), np.zeros(room, np.float32)
    residual, dense = np.zeros(n, np.float32), np.zeros(n, np.float32)

    def ours(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
        def on(isa: str) -> Callable[[], object]:
            def run() -> None:
                sparsify._force_isa(isa)
                call()
            return run
        calls = {isa: on(isa) for isa in levels(sparsify)}
        return dict(reversed(calls.items()))

    yield "top k", 4 * n + 8 * k, ours(lambda: sparsify.top_k(x, k, chosen, values)) | {
        "torch.topk": lambda: torch.topk(tensor.abs(), k, sorted=False),
        "numpy.argpartition": lambda: np.argpartition(np.abs(x), n - k)[n - k:]}
    yield "top k, no spare room", 4 * n + 8 * k, ours(lambda: sparsify.top_k(x, k, chosen[:k], values[:k]))

    def absorb_in_torch() -> None:
        total = torch.from_numpy(residual).add_(tensor)
        total[torch.topk(total.abs(), k, sorted=False).indices] = 0
    yield "residual + x, top k, settle", 20 * n + 8 * k, ours(
        lambda: sparsify.absorb(residual, x, k, chosen, values)) | {"torch": absorb_in_torch}
    yield "random subset", 4 * k, ours(lambda: sparsify.draw(n, k / n, 1, chosen)) | {
        "torch.rand < p": lambda: torch.nonzero(torch.rand(n) < k / n)}
    sparsify._force_isa()

    sparsify.top_k(x, k, chosen, values)
    chosen, values = chosen[:k].copy(), values[:k].copy()
    coded = np.zeros(indices.room_for(n, k), np.uint8)
    used = indices.encode(chosen, coded)
    back = np.zeros(k, np.uint32)
    place, part = torch.from_numpy(chosen.astype(np.int64)), torch.from_numpy(values)
    bits = f"{8 * used / k:.3f} bits each, bound {entropy_bits(n, k):.3f}"
    yield f"indices, encode: {bits}", 4 * k, {"Rice": lambda: indices.encode(chosen, coded)}
    yield "indices, decode", 4 * k, {"Rice": lambda: indices.decode(coded[:used], n, back)}
    yield "sparse sum", 16 * k, {
        "scalar": lambda: sparsify.add_values(dense, chosen, values),
        "torch.index_add_": lambda: torch.from_numpy(dense).index_add_(0, place, part),
        "numpy.add.at": lambda: np.add.at(dense, chosen, values)}


def main(argv: list[str]) -> int:
    """Run the benchmark; exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m bench sparsify", description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=25_000_000, metavar="N",
                        help="float32 elements (default 25e6)")
    parser.add_argument("--ratios", type=lambda text: parse_list(text, float), default=[0.1, 0.01], metavar="R,R",
                        help="shares of them to choose (default 0.1,0.01)")
    parser.add_argument("--reps", type=int, default=5, help="timings of each call (default 5)")
    parser.add_argument("--json", metavar="FILE", help="also write the samples' summaries to FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    record: dict = {"benchmark": "sparsify", "machine": machine(), "elements": options.elements, "rows": []}
    for key, fact in record["machine"].items():
        print(f"{key}: {fact}")
    lines = []
    for ratio in options.ratios:
        k = max(1, round(options.elements * ratio))
        for what, nbytes, calls in cases(options.elements, k):
            times = interleaved(calls, options.reps)
            first = next(iter(times.values())).median
            for name, taken in times.items():
                record["rows"].append({"what": what, "k": k, "how": name, "seconds": taken._asdict()})
                lines.append([f"{ratio:g}", what, name, *map(human_time, taken), f"{nbytes / taken.median / 1e9:.1f}",
                              human_ratio(taken.median / first)])
    print(f"\n{options.elements} float32, normal. GB/s of what must move at least; \"times\": the first of its group.")
    print(table(["ratio", "what", "how", "min", "median", "max", "GB/s", "times"], lines, left=3))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return 0
