"""Throughput of the per-element kernels on every instruction set of this machine: `python -m bench.kernels`.

GB/s of bytes read and written, min/median/max, beside the rival that a user would call and memory copy as the bound.
"""
import itertools
import os
import platform
import statistics
import sys
import time
import zlib
from functools import partial

import numpy as np
import torch

from fleetcore.errors import DType, ReduceOp
from fleetcore.kernels import cast, checksum, quantize, reduce

SIZES = {"256K": 1 << 18, "64M": 1 << 26}   # one chunk between hosts (fits L2); a bucket that fits no cache
TORCH = {
    DType.FLOAT32: torch.float32, DType.FLOAT64: torch.float64, DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16, DType.INT8: torch.int8, DType.INT16: torch.int16, DType.INT32: torch.int32,
    DType.INT64: torch.int64, DType.UINT8: torch.uint8, DType.BOOL: torch.bool,
}


def measure(nbytes, call, *args, repeats=11, budget_s=0.25):
    """Return (min, median, max) GB/s of `repeats` timings, about budget_s in all."""
    call(*args)
    start = time.perf_counter()
    call(*args)
    loops = max(1, int(budget_s / repeats / max(time.perf_counter() - start, 1e-7)))
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(loops):
            call(*args)
        rates.append(nbytes * loops / (time.perf_counter() - start) / 1e9)
    return min(rates), statistics.median(rates), max(rates)


def levels(module):
    """Yield every instruction set that `module` can use here, with it in force."""
    try:
        for name in ("generic", "table", "sse2", "sse4.2", "neon", "crc", "avx2", "avx512"):
            try:
                module._force_isa(name)
            except ValueError:
                continue
            yield name
    finally:
        module._force_isa()


def array(nbytes, dtype, seed=1):
    """Return (bytes-level array, torch tensor) over the same fresh memory, holding small values of dtype."""
    values = torch.from_numpy(np.random.default_rng(seed).uniform(1, 2, nbytes // TORCH[dtype].itemsize))
    tensor = values.to(TORCH[dtype])
    return tensor.view(torch.uint8).numpy(), tensor


def reduce_rows(nbytes, dtypes=tuple(DType), op=ReduceOp.SUM, num_srcs=2):
    for dtype in dtypes:
        srcs, tensors = zip(*(array(nbytes, dtype, seed) for seed in range(num_srcs)), strict=True)
        out, rival = array(nbytes, dtype)
        moved = (num_srcs + 1) * nbytes
        divisor = num_srcs if op == ReduceOp.MEAN else 1
        for isa in levels(reduce):
            yield (f"reduce {op.name} {dtype.name} {num_srcs} srcs", isa, moved,
                   reduce.reduce_arrays, [out], srcs, op, dtype, divisor)
        if op == ReduceOp.SUM and num_srcs == 2:
            yield f"torch.add {dtype.name}", "rival", moved, partial(torch.add, out=rival), *tensors
            if dtype != DType.BFLOAT16:
                arrays = [tensor.numpy() for tensor in tensors]
                yield f"numpy.add {dtype.name}", "rival", moved, partial(np.add, out=rival.numpy()), *arrays


def cast_rows(nbytes):
    for half in (DType.FLOAT16, DType.BFLOAT16):
        wide, wide_tensor = array(nbytes, DType.FLOAT32)
        narrow, narrow_tensor = array(nbytes // 2, half)
        for dst, dst_dtype, src, src_dtype, to, source in (
                (narrow, half, wide, DType.FLOAT32, narrow_tensor, wide_tensor),
                (wide, DType.FLOAT32, narrow, half, wide_tensor, narrow_tensor)):
            name, moved = f"{src_dtype.name} -> {dst_dtype.name}", nbytes * 3 // 2
            for isa in levels(cast):
                yield f"cast {name}", isa, moved, cast.cast_array, dst, dst_dtype, src, src_dtype
            yield f"torch copy_ {name}", "rival", moved, to.copy_, source


def quantize_rows(nbytes):
    """As they run in a step; bench.compress has the rivals, and whole compressors."""
    source, total, residual = (array(nbytes, DType.FLOAT32, seed)[1].numpy() for seed in range(3))
    for name, code, key in (("int8", 8, None), ("int8 random", 8, 1), ("int7", 7, None), ("int4", 4, None),
                            ("sign", quantize.SIGN, None), ("fp8", quantize.FP8, None)):
        out = np.zeros(quantize.encoding_bytes(code, source.size), np.uint8)
        moved = nbytes + out.nbytes
        for isa in levels(quantize):
            yield f"encode {name}", isa, moved, quantize.encode_array, code, source, out, key
            yield f"encode feedback {name}", isa, moved + 2 * nbytes, quantize.encode_feedback_array, code, source, residual, out, key
            if key is None:
                yield f"decode {name}", isa, moved, quantize.decode_array, code, out, total
                yield f"decode add {name}", isa, moved + nbytes, quantize.decode_add_array, code, out, total


def checksum_rows(nbytes):
    data, _ = array(nbytes, DType.UINT8)
    for isa in levels(checksum):
        yield "crc32c", isa, nbytes, checksum.checksum, data
    yield "zlib.crc32", "rival", nbytes, zlib.crc32, data


def rows(only=""):
    """Yield (what, size, isa, (min, median, max) GB/s) for every row whose name contains `only`."""
    floats = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
    for size, nbytes in SIZES.items():
        target, source = array(nbytes, DType.UINT8)[0], array(nbytes, DType.UINT8)[0]
        for what, isa, moved, *call in itertools.chain(
                [("memory copy", "bound", 2 * nbytes, np.copyto, target, source)],
                reduce_rows(nbytes), reduce_rows(nbytes, floats, ReduceOp.MEAN),
                reduce_rows(nbytes, floats, ReduceOp.MIN), reduce_rows(nbytes, floats, num_srcs=8),
                cast_rows(nbytes), quantize_rows(nbytes), checksum_rows(nbytes)):
            if only in what or isa == "bound":
                yield what, size, isa, measure(moved, *call)


def main(only=""):
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; GB/s read + written, one thread")
    for what, size, isa, rates in rows(only):
        print(f"{what:36} {size:>5} {isa:>7}", *(f"{rate:8.1f}" for rate in rates))


if __name__ == "__main__":
    main(*sys.argv[1:2])
