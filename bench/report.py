"""What every benchmark prints: sizes, durations, statistics, tables, and the machine they were taken on."""
from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "KB": 1 << 10, "M": 1 << 20, "MB": 1 << 20, "G": 1 << 30, "GB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes in "4", "64B", "16 KB" or "1.5MiB"; KB, MB and GB are powers of 1024, as in torch's bucket sizes.

    Raises:  ValueError when text is no size, or names a fraction of a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper().replace("IB", "B"))
    size = float(match[1]) * unit if unit else 0.5
    if size != int(size):
        raise ValueError(f"{text!r} is not a size; write 4, 64B, 16KB, 25MB or 1GB")
    return int(size)


def parse_list(text: str, kind=str) -> list:
    """The items of "a,b,c", each through kind, in the order given and once each.

    Raises:  ValueError when there is none, or when kind refuses one.
    """
    items = list(dict.fromkeys(kind(item.strip()) for item in text.split(",") if item.strip()))
    if not items:
        raise ValueError(f"{text!r} names nothing")
    return items


def human_size(num_bytes: int) -> str:
    """The shortest exact name of a size: 4 B, 16 KB, 1.5 MB; parse_size reads it back."""
    for unit in ("GB", "MB", "KB"):
        value = num_bytes / _UNITS[unit]
        if value >= 1 and value * 100 == int(value * 100):
            return f"{value:g} {unit}"
    return f"{num_bytes} B"


def human_time(seconds: float) -> str:
    """Three digits and a unit: 812 ns, 1.20 us, 14.5 ms, 2.00 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale * 0.9995:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def human_rate(bytes_per_s: float) -> str:
    """Three digits in GB/s, 10^9 bytes per second; below 1 MB/s a rate says nothing."""
    return _three_digits(bytes_per_s / 1e9) if bytes_per_s >= 1e6 else "< 0.001"


def human_ratio(ratio: float) -> str:
    """Three digits: how many times one thing is another."""
    return _three_digits(ratio)


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


class Summary(NamedTuple):
    """What is told of a set of samples."""

    min: float
    median: float
    max: float


def summary(samples: Iterable[float]) -> Summary:
    """Minimum, median and maximum of at least one sample."""
    ordered = sorted(samples)
    return Summary(ordered[0], statistics.median(ordered), ordered[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Rows under a header, columns padded to the widest cell; the first `left` columns flush left, the others right."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def tell_troubles(troubles: Iterable[dict], other_work_cores: float) -> str:
    """What a reader must know about a run before trusting it, one line each; "" when there is nothing.

    Args:    troubles: {"system", "size" (None: before any), "reason"}.  other_work_cores: kept busy by others meanwhile.
    """
    lines = [f"{trouble['system']}: "
             + ("not available" if trouble["size"] is None else f"FAILED at {human_size(trouble['size'])}")
             + f": {trouble['reason']}" for trouble in troubles]
    if other_work_cores > 0.1:
        lines.append(f"other work kept {other_work_cores:.1f} cores busy meanwhile: these times are not the machine's best")
    return "\n".join(f"  {line}" for line in lines)


def machine() -> dict[str, str]:
    """The machine and the software that timings depend on, ready to print; what cannot be learnt is left out."""
    facts = {
        "cpu": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"
                 f" of {os.cpu_count()}",
        "memory": human_size((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 30 << 30),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 minutes, before the run)",
        "huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "congestion control": congestion_control(),
        "python": platform.python_version(),
    }
    for package in ("pyfleet", "numpy", "torch", "mpi4py", "mlx"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {key: value for key, value in facts.items() if value}


def congestion_control() -> str:
    """The TCP congestion control of new sockets in this network namespace; "" where the system does not tell."""
    return _read("/proc/sys/net/ipv4/tcp_congestion_control")


def _cpu_model() -> str:
    match = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _chosen(path: str) -> str:
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else ""


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""
