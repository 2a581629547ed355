"""Compressors on one thread: bytes left of float32, indices and scales included, error made, and what coding costs."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pyfleet.benchmarks.base import MIN_REPS, ROW_S
from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback

# One gradient in ten where elements are selected: the usual example.
METHODS = ("none", "fp16", "bf16", "fp8", "int8", "int4", "sign", "topk(ratio=0.1)", "topk(ratio=0.1)+fp16",
           "topk(ratio=0.01)+fp16", "random(ratio=0.1)", "powersgd")
MAX_ROUNDS = 50


def measure(sizes: list[int], methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """One row a size and method, the methods in turns.

    Args:    sizes: bytes of a float32 gradient of normal numbers.
    Returns: {"size", "system": the specification, "encoded_bytes", "error": |decoded - x| / |x|, and seconds of every
             round: "encode_s", "decode_s", "feedback_s" (encoding with error feedback; [] where nothing is lost)}.
    """
    return [row for num_bytes in sizes for row in _rows(num_bytes, methods)]


def _rows(num_bytes: int, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    x = np.random.default_rng(0).standard_normal(num_bytes // 4, np.float32)
    rows, calls = [], []
    for spec in methods:
        row, timed = _prepare(spec, x)
        rows.append(row)
        calls += [(row[name], call) for name, call in timed.items()]
    rounds, turn = 1, -2            # the first turn touches the memory, the second one plans
    while turn < rounds:
        start = time.perf_counter()
        for seconds, call in calls:
            began = time.perf_counter()
            call()
            if turn >= 0:
                seconds.append(time.perf_counter() - began)
        if turn == -1:
            rounds = max(MIN_REPS, min(MAX_ROUNDS, int(ROW_S * len(rows) / (time.perf_counter() - start))))
        turn += 1
    return rows


def _prepare(spec: str, x: np.ndarray) -> tuple[dict[str, Any], dict[str, Callable[[], object]]]:
    """A row without its samples, and what fills them."""
    compressor, inner = parse_spec(spec), parse_spec(spec)
    for each in (compressor, inner):
        each.bind([_as_matrix(x.size)])
    feedback = ErrorFeedback(inner, x.size)
    out, spare = (np.zeros(compressor.wire_bytes(x.size), np.uint8) for _ in range(2))
    data, decoded = out[:compressor.encode(x, out)].copy(), np.zeros_like(x)
    compressor.decode(data, decoded)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    row = {"size": x.nbytes, "system": compressor.name, "encoded_bytes": data.size,
           "error": float(np.linalg.norm(decoded - x.astype(np.float64))) / norm, "encode_s": [], "decode_s": [], "feedback_s": []}
    timed = {"encode_s": lambda: compressor.encode(x, out), "decode_s": lambda: compressor.decode(data, decoded)}
    if compressor.lossy:
        timed["feedback_s"] = lambda: feedback.encode(x, spare)
    return row, timed


def _as_matrix(num_elems: int) -> tuple[int, int]:
    """The shape nearest to a square with a power of two as rows, as weights have it: only low-rank methods look at it."""
    rows = 1
    while num_elems % (2 * rows) == 0 and 4 * rows * rows <= num_elems:
        rows *= 2
    return rows, num_elems // rows
