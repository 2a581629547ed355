"""P0: what a node can do: its chip, cores, memory and accelerators, and how fast they are, measured once per boot."""
from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from pyfleet.placement import num_cores

FILE_NAME = "profile.json"
LARGEST_BYTES = 2048                    # every node holds those of all others, and the first message carries it
WORD = 64                               # characters of a name
MOST_ACCELERATORS = 8
MATMUL_S, COPY_S = 0.06, 0.03           # long enough for a clock to rise to what it holds; together 0.1 s at a start
STACK, ORDER = 16, 64                   # 0.5 MB, in a core's own cache; the largest order that BLAS does not split
DEVICE_ORDER = 4096                     # 64 MB a matrix: enough to fill every accelerator that people own
ASK_S = 10.0                            # for threads to start
COPY_BYTES = 32 << 20                   # beyond the caches of the machines that people own
PACKAGES = ("pyfleet", "torch", "numpy")


def profile(folder: Path | None = None) -> dict[str, Any]:
    """This node's profile: JSON-like, below LARGEST_BYTES as JSON.

    Measuring takes about 0.1 s (with an accelerator some more, to import torch), so the profile is kept in `folder`,
    and taken from there until the next boot, or until cores or versions change. Nothing fails where it can not be kept,
    or where what is kept is damaged: it is measured again.

    Args:    folder: this node's home; None: measure now and keep nothing.
    Returns: name -> value; None where this system does not tell:
             chip, system, arch: words.  cores: those usable here.  memory_bytes: of the machine.
             accelerators: [{"kind", "name", "memory_bytes"}].  versions: {"python", "pyfleet", "torch", "numpy"}.
             matmul_gflops: 10^9 float32 operations/s of numpy on the cores.
             accelerator_gflops: the same of all accelerators together, as torch multiplies; None without one.
             copy_gb_s: 10^9 bytes/s that one core copies from memory to memory.
             weight: how much of a batch to begin with, relative to other nodes.
    """
    key = _key()
    kept = _read(folder, key) if folder is not None else None
    if kept is not None:
        return kept
    measured = _bounded(_measure())
    if folder is not None:
        _keep(folder, {"key": key, "profile": measured})
    return measured


def weight(facts: dict[str, Any]) -> float:
    """What a node with these facts can take of a batch, relative to others: GFLOP/s of accelerators, else of cores.

    Facts of another node may say anything: what is no number above 0 counts as 1, like a slow core.
    """
    for name in ("accelerator_gflops", "matmul_gflops"):
        value = facts.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
            return float(value)
    return 1.0


# ---- facts -----------------------------------------------------------------------------------------------------------

def chip() -> str | None:
    """The processor's name, as its maker gives it."""
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return told.stdout.strip() or None
    for path, pattern in (("/proc/cpuinfo", r"^model name\s*:\s*(.+)$"), ("/proc/device-tree/model", r"^([^\0]+)"),
                          ("/proc/cpuinfo", r"^Model\s*:\s*(.+)$")):
        try:
            found = re.search(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found[1].strip()
    return platform.processor() or None


def accelerators() -> list[dict[str, Any]]:
    """What torch could use; torch is asked only where there is a sign of one, for importing it takes seconds."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if not apple and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return []
    try:
        import torch
        found = [{"kind": "cuda", "name": torch.cuda.get_device_name(index),
                  "memory_bytes": torch.cuda.get_device_properties(index).total_memory}
                 for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            found.append({"kind": "mps", "name": chip(), "memory_bytes": None})
    except Exception as error:      # noqa: BLE001 a broken driver or torch is itself a fact about this machine
        return [{"kind": "unusable", "name": " ".join(str(error).split()), "memory_bytes": None}]
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of PACKAGES; None for what is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- measuring -------------------------------------------------------------------------------------------------------

def matmul_gflops(budget_s: float = MATMUL_S) -> float:
    """10^9 float32 operations/s of numpy's matrix product on all usable cores: the sum of each core's best call.

    BLAS computes so small products in the calling thread. Its own threads wait for each other, so that a machine with
    anything else to do looks many times slower than it is; here other work takes calls away, but not from the best one.
    """
    import numpy as np
    cores = num_cores()
    start = threading.Barrier(cores)

    def core(_):
        a = np.full((STACK, ORDER, ORDER), 0.5, np.float32)
        out = np.empty_like(a)
        np.matmul(a, a, out=out)
        start.wait(ASK_S)
        return _best_rate(lambda: np.matmul(a, a, out=out), 2 * STACK * ORDER ** 3, budget_s)
    with ThreadPoolExecutor(cores) as threads:
        return sum(threads.map(core, range(cores))) / 1e9


def accelerator_gflops(found: list[dict[str, Any]], budget_s: float = MATMUL_S) -> float | None:
    """The same of torch on each accelerator in turn, added up; None when there is none, or none that works."""
    total, num_cuda = 0.0, 0
    for each in found:
        if each["kind"] == "cuda":
            total += _torch_gflops(f"cuda:{num_cuda}", budget_s)
            num_cuda += 1
        elif each["kind"] == "mps":
            total += _torch_gflops("mps", budget_s)
    return total or None


def _torch_gflops(device, budget_s):
    import torch
    try:
        a = torch.full((DEVICE_ORDER, DEVICE_ORDER), 0.5, dtype=torch.float32, device=device)
        out = torch.empty_like(a)

        def product():
            torch.mm(a, a, out=out)
            torch.mps.synchronize() if device == "mps" else torch.cuda.synchronize(device)
        product()                                   # loads the library of the device
        return _best_rate(product, 2 * DEVICE_ORDER ** 3, budget_s) / 1e9
    except Exception:               # noqa: BLE001 a driver may fail in any way: then this device does no work either
        return 0.0


def _best_rate(call, amount, budget_s):
    """The best amount/s of calls within a budget; at least one call."""
    best, now = 0.0, time.perf_counter()
    end = now + budget_s
    while now < end:
        began, _, now = now, call(), time.perf_counter()
        best = max(best, amount / (now - began))
    return best


def copy_gb_s(budget_s: float = COPY_S) -> float:
    """10^9 bytes/s that one core copies from memory to memory; the best call. Needs two times COPY_BYTES."""
    import numpy as np
    source = np.ones(COPY_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    np.copyto(target, source)                       # its pages are there now
    return _best_rate(lambda: np.copyto(target, source), COPY_BYTES, budget_s) / 1e9


def _measure() -> dict[str, Any]:
    found = accelerators()
    fast = accelerator_gflops(found)
    facts = {
        "chip": chip(), "system": f"{platform.system()} {platform.release()}", "arch": platform.machine(),
        "cores": num_cores(), "memory_bytes": psutil.virtual_memory().total, "accelerators": found,
        "versions": versions(),
        "matmul_gflops": round(matmul_gflops(), 2), "accelerator_gflops": fast and round(fast, 2),
        "copy_gb_s": round(copy_gb_s(), 2),
    }
    return facts | {"weight": weight(facts)}


def _bounded(facts: Any) -> Any:
    """The same with long words and lists cut."""
    if isinstance(facts, str):
        return facts.encode("ascii", "replace").decode()[:WORD]
    if isinstance(facts, list):
        return [_bounded(each) for each in facts[:MOST_ACCELERATORS]]
    if isinstance(facts, dict):
        return {name: _bounded(value) for name, value in facts.items()}
    return facts


# ---- keeping ---------------------------------------------------------------------------------------------------------

def _key() -> dict[str, Any]:
    """What the measurements hold for: this boot of this machine, these cores, these versions."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = str(round(psutil.boot_time() / 60))  # seconds of it shift when the clock is set
    return {"boot": boot, "machine": platform.node(), "cores": num_cores(), "versions": versions()}


def _read(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with open(folder / FILE_NAME, "rb") as file:
            content = json.loads(file.read(4 * LARGEST_BYTES))
        return content["profile"] if content["key"] == key and _complete(content["profile"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _complete(facts: Any) -> bool:
    needed = {"chip", "cores", "memory_bytes", "matmul_gflops", "copy_gb_s", "weight"}
    return isinstance(facts, dict) and needed <= set(facts)


def _keep(folder: Path, content: dict[str, Any]) -> None:
    temporary = folder / f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content))
            os.replace(temporary, folder / FILE_NAME)
        finally:
            temporary.unlink(missing_ok=True)
