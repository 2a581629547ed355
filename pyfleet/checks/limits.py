"""P5: what this machine, its container or its administrator holds back: cores, memory, descriptors, other ranks' memory."""
from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from pyfleet.checks.base import OK, WARN, Finding, Subject
from pyfleet.placement import num_cores

LEAST_FILES = 1024              # 64 machines take 3 connections each and as many stripes; data loaders take the rest
LEAST_SHM_BYTES = 256 << 20     # workers of torch's data loaders hand batches over there; Docker gives 64 MB
CGROUP, KERNEL = Path("/sys/fs/cgroup"), Path("/proc/sys/kernel")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
SHM = Path("/dev/shm")


def check(subject: Subject) -> Iterator[Finding]:
    """A finding per limit."""
    yield _cores(subject.num_ranks)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _finding("limits files", files == resource.RLIM_INFINITY or files >= LEAST_FILES, f"{_amount(files)} descriptors",
                   f"ulimit -n {LEAST_FILES}: every connection takes one")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield _finding("limits locked memory", True, f"{_amount(locked)} bytes", "")
    memory = _cgroup_number("memory.max")
    if memory is not None:
        yield _finding("limits memory", True, f"this control group may use {memory >> 20} MiB", "")
    if SHM.is_dir():
        shm = shutil.disk_usage(SHM).total
        yield _finding("limits shared memory", shm >= LEAST_SHM_BYTES, f"{SHM} has {shm >> 20} MiB",
                       "data loaders with workers need more: docker run --shm-size=1g, or ipc: host")
    if sys.platform == "linux":
        yield _reading()
        pages = {name: _chosen(HUGE_PAGES / name) for name in ("enabled", "shmem_enabled")}
        told = ", ".join(f"{name}: {chosen or 'unknown'}" for name, chosen in pages.items())
        yield _finding("limits huge pages", pages["enabled"] != "never", told,
                       f"large arrays are slower without: echo madvise > {HUGE_PAGES / 'enabled'}")


def _cores(num_ranks):
    cores, quota = num_cores(), None
    fields = (_text(CGROUP / "cpu.max") or "").split()
    if len(fields) == 2 and fields[0].isdigit():
        quota = int(fields[0]) / int(fields[1])
    most = cores if quota is None else min(cores, quota)
    seen = f"{cores} usable" + (f", of which this control group may use {quota:g}" if most < cores else "")
    if num_ranks is not None and num_ranks > most:
        return Finding("limits cores", WARN, f"{num_ranks} ranks on {seen}",
                       "ranks that share a core wait for each other: start fewer")
    if most < cores:
        return Finding("limits cores", WARN, seen,
                       f"threads count on {cores}: set OMP_NUM_THREADS={max(1, int(most))}, or raise the quota")
    return Finding("limits cores", OK, seen + (f", for {num_ranks} ranks" if num_ranks is not None else ""))


def _reading():
    """Whether a rank may read the ordinary memory of another one with process_vm_readv."""
    name, scope = "limits reading memory", _text(KERNEL / "yama" / "ptrace_scope")
    advice = "arrays in ordinary memory are copied through shared memory instead, which is slower; pyfleet.empty() is not"
    if scope in ("2", "3"):
        return Finding(name, WARN, f"Yama forbids it (ptrace_scope {scope})", f"{advice}; sysctl -w kernel.yama.ptrace_scope=1")
    if not may_read():
        return Finding(name, WARN, "this system or container forbids it", f"{advice}; docker run --cap-add SYS_PTRACE")
    return Finding(name, OK, "ranks of this machine may read each other's memory")


def may_read() -> bool:
    """Whether process_vm_readv works at all, on this process itself: seccomp rules of containers refuse it to all."""
    source, target = ctypes.create_string_buffer(b"pyfleet"), ctypes.create_string_buffer(8)
    parts = [(ctypes.c_size_t * 2)(ctypes.addressof(each), 8) for each in (target, source)]     # struct iovec
    libc = ctypes.CDLL(None, use_errno=True)
    taken = libc.process_vm_readv(os.getpid(), ctypes.byref(parts[0]), ctypes.c_ulong(1), ctypes.byref(parts[1]),
                                  ctypes.c_ulong(1), ctypes.c_ulong(0))
    return taken == 8 and target.value == b"pyfleet"


def _finding(name, fine, seen, advice):
    return Finding(name, OK, seen) if fine else Finding(name, WARN, seen, advice)


def _amount(number):
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _cgroup_number(name):
    text = _text(CGROUP / name)
    return int(text) if text and text.isdigit() else None


def _chosen(path):
    """The word in brackets: 'always [madvise] never' is madvise."""
    return next((word.strip("[]") for word in (_text(path) or "").split() if word.startswith("[")), None)


def _text(path):
    try:
        return path.read_text().strip()
    except OSError:
        return None
