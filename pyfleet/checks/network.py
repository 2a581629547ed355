"""P5: what the kernel's TCP allows: congestion control and the size of its buffers."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pyfleet.checks.base import FAIL, OK, SKIPPED, WARN, Finding, Subject

IPV4 = Path("/proc/sys/net/ipv4")
LEAST_BUFFER_BYTES = 1 << 20    # 1 Gbit/s times 8 ms, the queue of a small switch


def check(subject: Subject) -> Iterator[Finding]:
    """Congestion control, then buffers."""
    wanted = subject.cluster.congestion
    current, there = _read("tcp_congestion_control"), (_read("tcp_available_congestion_control") or "").split()
    if current is None:
        yield Finding("network congestion", SKIPPED, "this system does not tell")
    elif wanted is not None and wanted not in there:
        yield Finding("network congestion", FAIL, f"congestion is {wanted!r}, and the kernel offers {', '.join(there)}",
                      f"modprobe tcp_{wanted}, or leave PYFLEET_CONGESTION out")
    else:
        yield Finding("network congestion", OK, f"{wanted or current} of {', '.join(there)}")
    small = {}
    for name in ("tcp_wmem", "tcp_rmem"):
        fields = (_read(name) or "").split()
        if len(fields) == 3 and int(fields[2]) < LEAST_BUFFER_BYTES:
            small[name] = int(fields[2])
    if small:
        yield Finding("network buffers", WARN, ", ".join(f"{name} ends at {most} bytes" for name, most in small.items()),
                      "; ".join(f"sysctl -w net.ipv4.{name}='4096 131072 {4 * LEAST_BUFFER_BYTES}'" for name in small))
    elif current is not None:
        yield Finding("network buffers", OK, f"tcp_wmem {_read('tcp_wmem')}, tcp_rmem {_read('tcp_rmem')}")


def _read(name):
    try:
        return (IPV4 / name).read_text().strip()
    except OSError:
        return None
