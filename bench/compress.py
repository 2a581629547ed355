"""Compressors: bytes left, error made and GB/s of one thread, beside the same in torch operations.

Rates are of float32 bytes, in GB/s, medians of rounds in which every method takes its turn; `overhead` is what encoding
and decoding-and-adding take together. A rival is written twice: plainly, as one would, and with all its memory made
beforehand. Bytes are those of encodings; frames add a few per mille.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from bench.report import (
    human_rate,
    human_ratio,
    human_time,
    machine,
    parse_list,
    parse_size,
    summary,
    table,
)
from pyfleet.compressors import COMPRESSORS, parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.errors import ConfigError

BLOCK = 256     # of the rivals too, so that they do the same work
WHAT = ("encode", "feedback", "decode", "decode_add")
# Where a kind of the table is named with parameters, the ratio of the usual example: one gradient in ten.
DEFAULTS = ("none", "fp16", "bf16", "fp8", "int8", "int8(stochastic=True)", "int6", "int4", "sign", "topk(ratio=0.1)",
            "topk(ratio=0.1)+fp16", "topk(ratio=0.01)+fp16", "random(ratio=0.1)")


@dataclass
class Method:
    """One way to compress: calls to time, how many bytes it leaves, and what decoding gives."""

    name: str
    is_rival: bool
    calls: dict[str, Callable[[], object]]
    num_bytes: Callable[[], int]
    values: Callable[[], np.ndarray]
    seconds: dict[str, list[float]] = field(default_factory=dict)


def ours(spec: str, x: np.ndarray) -> Method:
    """The compressor of a specification, over x."""
    compressor = parse_spec(spec)
    feedback = ErrorFeedback(compressor.fresh(), x.size)
    out, spare = np.zeros(compressor.wire_bytes(x.size), np.uint8), np.zeros(compressor.wire_bytes(x.size), np.uint8)
    data = out[:compressor.encode(x, out)].copy()
    values, total = np.zeros_like(x), np.zeros_like(x)
    calls = {"encode": lambda: compressor.encode(x, out), "decode": lambda: compressor.decode(data, values),
             "decode_add": lambda: compressor.decode_add(data, total)}
    if compressor.lossy:
        calls["feedback"] = lambda: feedback.encode(x, spare)

    def decoded() -> np.ndarray:
        compressor.decode(data, values)
        return values
    return Method(compressor.name, False, calls, lambda: data.size, decoded)


def torch_casts(x: np.ndarray, dtype: torch.dtype) -> Iterator[Method]:
    """torch's casts to a half and back."""
    name, source = str(dtype).partition(".")[2], torch.from_numpy(x)
    half, back, total = source.to(dtype), torch.zeros_like(source), torch.zeros_like(source)
    yield Method(f"torch {name}", True, {
        "encode": lambda: source.to(dtype), "decode": lambda: half.to(torch.float32),
        "decode_add": lambda: total.add_(half.to(torch.float32))}, lambda: half.nbytes, lambda: half.float().numpy())
    yield Method(f"torch {name}, memory made", True, {
        "encode": lambda: half.copy_(source), "decode": lambda: back.copy_(half), "decode_add": lambda: total.add_(half)},
        lambda: half.nbytes, lambda: half.float().numpy())


def torch_int8(x: np.ndarray) -> Iterator[Method]:
    """int8 in blocks with a scale, as torch operations."""
    source = torch.from_numpy(x[:x.size // BLOCK * BLOCK]).view(-1, BLOCK)
    scaled, back, total = torch.zeros_like(source), torch.zeros_like(source), torch.zeros_like(source)
    codes, scales = torch.zeros(source.shape, dtype=torch.int8), torch.zeros(source.shape[0], 1)

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        steps = source.abs().amax(dim=1, keepdim=True) / 127
        return steps, (source / steps).round().clamp(-127, 127).to(torch.int8)

    def encode_made() -> None:
        torch.linalg.vector_norm(source, float("inf"), dim=1, keepdim=True, out=scales).div_(127)
        torch.div(source, scales, out=scaled).round_()
        codes.copy_(scaled)

    encode_made()

    def values() -> np.ndarray:
        return np.concatenate([(codes.float() * scales).view(-1).numpy(), x[source.numel():]])

    def num_bytes() -> int:
        return codes.nbytes + scales.nbytes
    yield Method("torch int8", True, {
        "encode": encode, "decode": lambda: codes.float() * scales,
        "decode_add": lambda: total.add_(codes.float() * scales)}, num_bytes, values)
    yield Method("torch int8, memory made", True, {
        "encode": encode_made, "decode": lambda: back.copy_(codes).mul_(scales),
        "decode_add": lambda: total.addcmul_(back.copy_(codes), scales)}, num_bytes, values)


def methods(specs: list[str], x: np.ndarray) -> list[Method]:
    """Ours by specification, and the rivals of those that have any."""
    found = [ours(spec, x) for spec in specs]
    names = {method.name for method in found}
    for name, rivals in (("fp16", torch_casts(x, torch.float16)), ("bf16", torch_casts(x, torch.bfloat16)),
                         ("int8", torch_int8(x))):
        if name in names:
            found += rivals
    return found


def measure(found: list[Method], rounds: int) -> None:
    """Time every call of every method once a round, after one round that does not count."""
    for turn in range(rounds + 1):
        for method in found:
            for what, call in method.calls.items():
                start = time.perf_counter()
                call()
                if turn:
                    method.seconds.setdefault(what, []).append(time.perf_counter() - start)


def error_of(method: Method, x: np.ndarray) -> float:
    """The norm of what decoding is off by, over the norm of x."""
    return float(np.linalg.norm(method.values().astype(np.float64) - x) / np.linalg.norm(x.astype(np.float64)))


def rows(found: list[Method], x: np.ndarray) -> list[dict]:
    """One record a method: what the table prints, and every sample."""
    return [{"method": method.name, "rival": method.is_rival, "size_bytes": x.nbytes, "encoding_bytes": method.num_bytes(),
             "error": error_of(method, x), "seconds": method.seconds} for method in found]


def printed(records: list[dict]) -> str:
    """The table of one size."""
    lines = []
    for record in records:
        median = {what: summary(samples).median for what, samples in record["seconds"].items()}
        rates = [human_rate(record["size_bytes"] / median[what]) if what in median else "-" for what in WHAT]
        lines.append([record["method"], f"{100 * record['encoding_bytes'] / record['size_bytes']:.2f} %",
                      f"{record['error']:.2g}", *rates, human_time(median["encode"] + median["decode_add"])])
    return table(["method", "of float32", "error", *(what.replace("_", "-") for what in WHAT), "overhead"], lines, left=1)


def compared(records: list[dict]) -> list[str]:
    """How many times faster ours is than each rival of it, one line each."""
    lines, mine = [], {record["method"]: record["seconds"] for record in records if not record["rival"]}
    for record in records:
        name = record["method"].removeprefix("torch ").partition(",")[0].replace("bfloat", "bf").replace("float", "fp")
        if record["rival"] and name in mine:
            ratios = [f"{what.replace('_', '-')} {human_ratio(summary(samples).median / summary(mine[name][what]).median)}"
                      for what, samples in record["seconds"].items()]
            lines.append(f"{name} against {record['method']}: {', '.join(ratios)} times as fast")
    return lines


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when it could."""
    offered = [spec for spec in DEFAULTS if spec.partition("(")[0] in COMPRESSORS or spec.startswith("int")]
    parser = argparse.ArgumentParser(prog="python -m bench compress", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: parse_list(text, parse_size), default=[100_000_000], metavar="A,B",
                        help="bytes of float32 (default: 100 MB of 10^6, 25 million elements)")
    parser.add_argument("--methods", default=";".join(offered), metavar="A;B", help="specifications (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--json", metavar="FILE", help="write everything here, every sample included")
    options = parser.parse_args(argv)
    specs = [spec.strip() for spec in options.methods.split(";") if spec.strip()]
    if options.rounds < 1 or not specs or any(size < 4 * BLOCK or size % 4 for size in options.sizes):
        parser.error(f"at least one round and one method; sizes are multiples of 4 bytes from {4 * BLOCK} on")
    try:
        for spec in specs:
            parse_spec(spec)
    except ConfigError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    record = {"benchmark": "compress", "machine": machine(), "rows": []}
    for key, value in record["machine"].items():
        print(f"{key + ':':<20}{value}")
    for size in options.sizes:
        x = np.random.default_rng(0).standard_normal(size // 4, np.float32)
        found = methods(specs, x)
        measure(found, options.rounds)
        records = rows(found, x)
        print(f"\n{x.size:,} normal float32, one thread, {options.rounds} rounds\n\n{printed(records)}\n")
        print("\n".join(compared(records)), flush=True)
        record["rows"] += records
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
