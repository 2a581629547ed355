"""P5: whether machines that somebody named can be reached by TCP."""
from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator

from pyfleet.checks.base import FAIL, OK, SKIPPED, WARN, Finding, Subject

PATIENCE_S = 3.0                # a lost SYN is sent again after 1 s


def check(subject: Subject) -> Iterator[Finding]:
    """A finding per peer; without a port, the one of discovery_port."""
    if not subject.peers:
        yield Finding("peers", SKIPPED, "nobody was named: --peer host:port")
    for peer in subject.peers:
        host, colon, port = peer.rpartition(":") if peer.count(":") == 1 or peer.startswith("[") else (peer, "", "")
        host = (host if colon else peer).strip("[]")
        if colon and not port.isdigit():
            yield Finding(f"peers {peer}", FAIL, f"{peer!r} is not host:port", "write 192.0.2.7:52415 or [2001:db8::7]:52415")
            continue
        yield reach(peer, host, int(port or subject.cluster.discovery_port))


def reach(peer: str, host: str, port: int) -> Finding:
    """What comes of connecting to a port."""
    name, began = f"peers {peer}", time.monotonic()
    try:
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except socket.gaierror as error:
        return Finding(name, FAIL, f"{host!r} has no address: {error.strerror}", "use its IP address, or its name with .local")
    except ConnectionRefusedError:
        return Finding(name, WARN, f"{host} is there, and nobody listens on TCP {port}", "start pyfleet there; if it runs, its "
                       "firewall refuses, or it uses another port")
    except TimeoutError:
        return Finding(name, FAIL, f"{host} does not answer on TCP {port}", f"its firewall drops (let TCP {port} in), the "
                       f"machine is off, or it is on another network (compare `pyfleet info` on both)")
    except OSError as error:
        unreachable = error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        return Finding(name, FAIL, f"{host}: {error.strerror}", "the two machines share no network: compare the interfaces in "
                       "`pyfleet info` on both" if unreachable else "")
    return Finding(name, OK, f"{host} answers on TCP {port} in {1e3 * (time.monotonic() - began):.1f} ms")
