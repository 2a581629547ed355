"""Nodes of a test: one agent (pyfleet.membership.agent) on each host of a Network, asked how things stand there."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from pyfleet.contact import SocketContact
from pyfleet.errors import FleetError
from tests.network import Network
from tests.ranks import ROOT

PSK = "5e" * 32
LOOK_S = 0.02           # how often a node is asked while a test waits for something


class Agent:
    """One node. Its home, and so its identity, is that of its name.

    Args:    network: None: on this machine's own loopback.
    """

    def __init__(self, folder, network: Network | None, host: int, name: str | None = None, *, min_nodes: int = 1,
                 slots: int = 1, env: dict | None = None):
        self.name, self.host, self.network = name or f"node{host}", host, network
        self.path = str(folder / f"{self.name}-{time.monotonic_ns()}.sock")
        self.home = folder / self.name
        self.log = open(folder / f"{self.name}.log", "ab")      # noqa: SIM115 closed with the agent
        settings = {"PYFLEET_HOME": str(self.home), "PYFLEET_PSK": PSK, "PYFLEET_IFACE": "eth0" if network else "lo",
                    "PYTHONPATH": os.pathsep.join(sys.path), **(env or {})}
        argv = [sys.executable, "-m", "pyfleet.membership.agent", "--socket", self.path, "--slots", str(slots),
                "--min-nodes", str(min_nodes)]
        options = {"stdin": subprocess.PIPE, "stdout": self.log, "stderr": self.log, "cwd": ROOT}
        self.process = (network.popen(host, argv, settings, **options) if network else
                        subprocess.Popen(argv, env=os.environ | settings, **options))
        self.contact = SocketContact(self.path)

    def status(self) -> dict | None:
        """What it says; None while it says nothing yet."""
        with contextlib.suppress(FleetError):
            return self.contact.ask("status")
        return None

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.home.parent / f"{self.name}.log").read_text()

    def leave(self):
        """Have it go with a good-bye."""
        self.process.stdin.close()

    def kill(self):
        """End it like a power cut of the process: its kernel remains."""
        self.process.kill()

    def stop(self):
        """Freeze it; its kernel goes on answering."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        """Let it go on."""
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self):
        """End it, whatever state it is in. Idempotent."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.log.close()


class Agents:
    """The nodes of a test, by name; a context manager."""

    def __init__(self, folder, network: Network | None = None):
        self.folder, self.network, self.all = folder, network, []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for agent in self.all:
            agent.close()

    def start(self, host: int, name: str | None = None, **options) -> Agent:
        """One more node."""
        agent = Agent(self.folder, self.network, host, name, **options)
        self.all.append(agent)
        return agent

    def words(self) -> str:
        """What all of them have printed, for a failure's message."""
        return "\n".join(f"--- {agent.name}\n{agent.output}" for agent in {agent.name: agent for agent in self.all}.values())


def wait_for(condition, timeout: float, what: str = "", agents: Agents | None = None) -> float:
    """The seconds that it took for a condition to hold. Fails the test when it takes longer."""
    began = time.monotonic()
    while True:
        found = condition()
        took = time.monotonic() - began
        if found:
            return took
        if took > timeout:
            words = agents.words() if agents else ""
            raise AssertionError(f"{what or condition} did not come true within {timeout:g} s\n{words}")
        time.sleep(LOOK_S)


def agree(agents, peers=None) -> dict | None:
    """The status of the first node, once all have one view of exactly these nodes; None as long as they have not."""
    found = [agent.status() for agent in agents]
    if not all(found) or not all(status["fleet"] for status in found):
        return None
    own = sorted(status["peer"] for status in found)
    views = {(status["fleet"], status["epoch"], status["leader"], tuple(sorted(members(status)))) for status in found}
    if len(views) == 1 and sorted(members(found[0])) == sorted(peers or own) and any(s["is_leading"] for s in found):
        return found[0]
    return None


def members(status) -> list[str]:
    """The peer ids of a view, in its order."""
    return [node["peer"] for node in status["nodes"] if node["in_view"]]
