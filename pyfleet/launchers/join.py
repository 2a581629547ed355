"""This machine's share of a job on several that find each other: the same command on each of them.

An agent (pyfleet.membership.agent) stands for this machine in the fleet. Once the fleet has a view to start in, the ranks
are started with their numbers in it; they meet through their agents.
"""
from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pyfleet.config import environment
from pyfleet.contact import SocketContact
from pyfleet.errors import FleetError
from pyfleet.launchers.base import Job, Launcher
from pyfleet.placement import settings_environment
from pyfleet.rendezvous.agent import url_of

START_S = 30.0          # for a Python that imports everything on a machine that swaps; it takes half a second
FAREWELL_S = 3.0        # the agent says good-bye within one second
POLL_S = 0.02


class JoinLauncher(Launcher):
    """Waits for the other machines, then has this one's ranks started.

    Args:    local: starts them.  min_nodes: machines to wait for, this one included.  timeout: seconds to wait.
    """

    def __init__(self, local: Launcher, min_nodes: int, timeout: float):
        self.local, self.min_nodes, self.timeout = local, min_nodes, timeout

    def run(self, job: Job) -> int:
        """As the contract says.

        Raises:  also NotEnoughPeers("found 1 of 3 ..."), ConfigError and every other reason of the agent's.
        """
        with (tempfile.TemporaryDirectory(prefix="pyfleet-", ignore_cleanup_errors=True) as folder,
              _agent(f"{folder}/agent", job, self.min_nodes) as contact):
            view = contact.ask("ready", self.timeout, min_nodes=self.min_nodes)
            return self.local.run(replace(
                job, first_rank=view["first_rank"], total_ranks=view["world_size"], node=view["node_rank"],
                num_nodes=len(view["peers"]), master_addr=view["master_addr"], master_port=view["master_port"],
                rendezvous=url_of(contact.path, view["fleet"], view["epoch"])))


@contextlib.contextmanager
def _agent(path: str, job: Job, min_nodes: int) -> Iterator[SocketContact]:
    """A contact to an agent that lives as long as the context, or as this process."""
    agent = subprocess.Popen(
        [sys.executable, "-m", "pyfleet.membership.agent", "--socket", path, "--slots", str(job.num_ranks),
         "--min-nodes", str(min_nodes)],
        env={**environment(), **settings_environment(job.config_path, job.overrides)}, stdin=subprocess.PIPE,
        start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not Path(path).exists():          # a socket has no event before it is there
            if agent.poll() is not None:
                raise FleetError("this machine's agent could not start, for the reason above")
            if time.monotonic() > deadline:
                raise FleetError(f"this machine's agent did not start within {START_S:g} s")
            time.sleep(POLL_S)
        yield SocketContact(path)
    finally:
        agent.stdin.close()
        try:
            agent.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()
