"""Ranks on several machines, each reached by ssh; a machine that is this one is reached by a pipe.

What ssh runs there takes its environment, and with it every secret, from its stdin: no command line shows any. The ranks
end when the connection does, whatever ended it.
"""
from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from pyfleet.config import environment
from pyfleet.hosts import Host
from pyfleet.jobs import READ_BYTES, Job, Run, Screen, die_with
from pyfleet.launchers.base import ALIVE, Alive, Ended, Failed, Hello, Launcher, Order, Over, Printed, Unframer
from pyfleet.output import Sink

NUM_SILENCES = 3        # timeouts of a connection without a sign before ssh, or the far end, takes the other one for gone
NUM_PATIENCE = 5        # before we do: ssh's own words say more, where it watches this connection itself
WORDS_BYTES = 1 << 14   # what is kept of what ssh says
# For the login shell there, whichever it is: no !, no backslash, no line end. The first Python that is there reads a line
# of JSON, takes over environment and folder, and becomes the far end, which finds the rest on its stdin.
FIND_PYTHON = ('code=$1; shift; for python do if command -v "$python" >/dev/null 2>&1; then exec "$python" -I -c "$code"; '
               'fi; done; echo "there is no Python at $*" >&2; exit 127')
BECOME = ('import json,os,sys;told=json.loads(open(0,"rb",0,closefd=False).readline());os.environ.update(told["environment"]);'
          'os.chdir(next(filter(os.path.isdir,told["folders"]),told["folders"][0]));'
          'os.execv(sys.executable,[sys.executable,"-m","pyfleet.commands.remote"])')


@dataclass(frozen=True)
class Reach:
    """How to get to the machines, and where and with what to start there.

    Attributes:
        ssh:          the command, with options of one's own.
        python:       the interpreter there; None: this one's path, the same below the home folder there, or python3.
        folder:       where to start there; None: in this folder's path if it is there, else the same below the home folder.
        environment:  variables for the ranks, secrets among them.
        timeout_s:    for one attempt to connect.  start_s: for Python to start there, after that.
    """

    ssh: Sequence[str] = ("ssh",)
    port: int | None = None
    python: str | None = None
    folder: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 5.0
    start_s: float = 30.0

    @property
    def silence_s(self) -> float:
        """How long either end may hear nothing before it takes the other for gone."""
        return NUM_SILENCES * self.timeout_s


class SshLauncher(Launcher):
    """Starts job.num_ranks ranks on each host that does not say its own number; they meet where the first one listens."""

    def __init__(self, hosts: Sequence[Host], reach: Reach):
        self.hosts, self.reach = hosts, reach

    def run(self, job: Job) -> int:
        machines = [_Machine(host, host.slots or job.num_ranks) for host in self.hosts]
        job = replace(job, total_ranks=sum(machine.num_ranks for machine in machines))
        with _SshRun(job, Screen(job), machines, self.reach) as run:
            return run.to_its_end()


class _Machine:
    """One host: the process that leads there, and what is known of the other end."""

    def __init__(self, host: Host, num_ranks: int):
        self.host, self.num_ranks = host, num_ranks
        self.here = host.is_here()
        self.unframer = Unframer()
        self.words = b""                    # what ssh, or Python there, said on stderr
        self.hello: Hello | None = None
        self.ordered = self.over = self.closed = False
        self.running: set[int] = set()
        self.heard_at = math.inf            # once it is to be heard of

    def start(self, reach: Reach) -> None:
        """Start ssh, and hand over what the far end needs to become itself."""
        parent, known = os.getpid(), dict(environment())
        command = _remote_command(reach)
        if self.here:
            argv = ["sh", "-c", command]
            known.pop("SSH_CONNECTION", None)       # of whoever sits here
        else:
            argv = [*reach.ssh, "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={math.ceil(reach.timeout_s)}",
                    "-o", f"ServerAliveInterval={math.ceil(reach.timeout_s)}", "-o", f"ServerAliveCountMax={NUM_SILENCES}",
                    *(["-p", str(reach.port)] if reach.port else []), "--", self.host.address, command]
        self.process = subprocess.Popen(
            argv, env=known, cwd=Path.home() if self.here else None, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
            preexec_fn=(lambda: die_with(parent)) if sys.platform == "linux" else None)     # noqa: PLW1509 no threads here
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            os.set_blocking(stream.fileno(), False)
        self.open = {self.process.stdout, self.process.stderr}
        self.orders = Sink(self.process.stdin.fileno())
        self.orders.write(json.dumps({"environment": dict(reach.environment), "folders": _folders(reach)}).encode() + b"\n")

    def hang_up(self) -> None:
        """No more orders: the far end ends whatever it has started."""
        if not self.closed:
            self.closed = True
            self.orders.drop()
            self.process.stdin.close()

    def kill(self, number: int) -> None:
        """End ssh itself, and with it the connection."""
        with contextlib.suppress(ProcessLookupError, PermissionError):      # macOS says EPERM of a zombie
            os.killpg(self.process.pid, number)

    def last_words(self) -> str:
        """The last line that ssh or the far end said, or how the process ended."""
        lines = self.words.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self.process.returncode}"


def _remote_command(reach: Reach) -> str:
    mine = sys.executable
    home = str(Path.home()) + os.sep
    pythons = [reach.python] if reach.python else [mine, *([mine[len(home):]] if mine.startswith(home) else []), "python3"]
    return "exec " + shlex.join(["sh", "-c", FIND_PYTHON, "pyfleet", BECOME, *pythons])


def _folders(reach: Reach) -> list[str]:
    if reach.folder is not None:
        return [reach.folder]
    here, home = os.getcwd(), str(Path.home()) + os.sep
    return [here, *([here[len(home):]] if here.startswith(home) else [])]


class _SshRun(Run):
    """Machines that start, then ranks on all of them, then nobody."""

    def __init__(self, job: Job, screen: Screen, machines: Sequence[_Machine], reach: Reach):
        super().__init__(job, screen)
        self.machines, self.reach = machines, reach
        self.ordered = False
        self.problem: str | None = None         # with a machine, before anything else ended the job
        self.notes: list[str] = []
        self.abandon_at = math.inf

    # --- set up and tear down

    def _start(self) -> None:
        self.undo.callback(self._end_connections)
        for machine in self.machines:
            machine.start(self.reach)
        now = time.monotonic()
        self.hello_by = now + self.reach.timeout_s + self.reach.start_s
        self.alive_at = now

    def _end_connections(self) -> None:
        for machine in self.machines:
            if hasattr(machine, "process"):
                machine.hang_up()
                if machine.process.poll() is None:
                    machine.kill(signal.SIGKILL)
                machine.process.wait()
                machine.process.stdout.close()
                machine.process.stderr.close()

    # --- what the machines say

    def _streams(self) -> Iterable[tuple[object, Callable[[], object]]]:
        return [(stream, lambda m=machine, s=stream: self._read(m, s)) for machine in self.machines for stream in machine.open]

    def _offer(self) -> None:
        super()._offer()
        for machine in self.machines:
            if not machine.closed:
                self._follow(machine.orders.fd, selectors.EVENT_WRITE, not machine.orders.empty, machine.orders.pump)

    def _read(self, machine: _Machine, stream: object) -> bool:
        """Take one piece of what a machine says; False when there is none now."""
        try:
            data = os.read(stream.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            machine.open.discard(stream)
            self._follow(stream, 0, False, None)
        elif stream is machine.process.stderr:
            machine.words = (machine.words + data)[-WORDS_BYTES:]
        else:
            machine.heard_at = time.monotonic() if machine.ordered else math.inf
            try:
                for each in machine.unframer.feed(data):
                    self._hear(machine, each)
            except (ValueError, KeyError, msgspec.MsgspecError) as error:
                self._give_up(machine, f"it does not speak as this pyfleet does ({error})", started=machine.ordered)
        return bool(data)

    def _hear(self, machine: _Machine, said: object) -> None:
        match said:
            case Hello():
                machine.hello = said
            case Printed():
                self.screen.take(said.rank, said.stream, said.data)
            case Ended():
                machine.running.remove(said.rank)
                self.screen.ended(said.rank, said.status, said.told)
                if said.status and not said.told and not self.stopping:
                    self.failed.append((said.rank, said.status))
            case Alive():
                pass            # that it came is what it says
            case Failed():
                self._give_up(machine, said.why, started=False)
            case Over():
                machine.over = True
                machine.running.clear()

    def _give_up(self, machine: _Machine, why: str, *, started: bool) -> None:
        """A machine is of no use any more, and with it the job."""
        machine.over = True
        machine.running.clear()
        self._hang_up(machine)
        if not self.stopping:
            self.problem = f"{'lost' if started else 'cannot start ranks on'} {machine.host.address}: {why}"
            self._stop(signal.SIGTERM, time.monotonic())
        elif started:
            self.notes.append(f"lost {machine.host.address}: {why}")

    def _hang_up(self, machine: _Machine) -> None:
        if not machine.closed:
            self._follow(machine.orders.fd, 0, False, None)
            machine.hang_up()

    # --- the loop

    def _notice(self, now: float) -> None:
        for machine in self.machines:
            if not machine.over and machine.process.poll() is not None:
                for stream in list(machine.open):
                    while self._read(machine, stream):
                        pass
                if not machine.over and not (self.stopping and not machine.ordered):
                    self._give_up(machine, machine.last_words(), started=machine.ordered)
        if not self.ordered and not self.stopping and not self.signals:
            if all(machine.hello for machine in self.machines):
                self._order()
            elif now >= self.hello_by:
                late = next(machine for machine in self.machines if not machine.hello)
                self._give_up(late, f"pyfleet did not start within {self.reach.timeout_s + self.reach.start_s:g} s", started=False)
                late.kill(signal.SIGKILL)
        self._notice_silence(now)
        if now >= self.alive_at:
            self.alive_at = now + self.reach.silence_s / 4
            for machine in self.machines:
                if machine.ordered and machine.orders.empty:
                    machine.orders.write(bytes([ALIVE]))

    def _notice_silence(self, now: float) -> None:
        """Give up machines of which nothing was heard though we listened: ssh may share a connection that nobody watches."""
        limit = NUM_PATIENCE * self.reach.timeout_s
        for machine in self.machines:
            if self.screen.full:
                machine.heard_at = max(machine.heard_at, now) if machine.ordered else machine.heard_at
            elif not machine.over and now - machine.heard_at > limit:
                self._give_up(machine, f"nothing was heard of it for {limit:g} s", started=True)
                machine.kill(signal.SIGKILL)

    def _order(self) -> None:
        """Everybody is there: tell them where the ranks meet, and start them."""
        shared = {"grace_s": self.job.grace_s, "overrides": self.job.overrides, "config": self.job.config,
                  "total_ranks": self.job.total_ranks, "num_nodes": len(self.machines), "master_port": self.job.master_port}
        if len(self.machines) > 1:
            address = _meeting_address(self.machines)
            port = self.job.master_port or self.machines[0].hello.port
            shared |= {"master_addr": address, "master_port": port,
                       "rendezvous": f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"}
        command = list(self.job.command)
        if command[0] == sys.executable:
            command[0] = None
        first = 0
        for node, machine in enumerate(self.machines):
            machine.running = set(range(first, first + machine.num_ranks))
            for rank in sorted(machine.running):
                self.screen.start(rank)
            own = {"num_ranks": machine.num_ranks, "first_rank": first, "node": node}
            machine.orders.write(msgspec.json.encode(Order(command, shared | own, self.reach.silence_s)) + b"\n")
            machine.ordered, machine.heard_at = True, time.monotonic()
            first += machine.num_ranks
        self.ordered = True

    def _patience(self, now: float, drain_until: float | None) -> float:
        return min(super()._patience(now, drain_until), self.reach.silence_s / 4)

    def _signal(self, number: int) -> None:
        for machine in self.machines:
            if machine.ordered and not machine.over:
                machine.orders.write(bytes([number]))
            elif not machine.ordered:
                self._hang_up(machine)
                if machine.process.poll() is None and machine.hello is None:
                    machine.kill(signal.SIGKILL if number == signal.SIGKILL else signal.SIGTERM)       # ssh, on its way there
        if number == signal.SIGKILL:
            self.abandon_at = time.monotonic() + self.reach.timeout_s

    def _keep_stopping(self, now: float) -> None:
        if now >= self.abandon_at:
            for machine in self.machines:
                if machine.process.poll() is None:
                    if not machine.over:
                        self.notes.append(f"{machine.host.address} does not answer; its ranks end by themselves")
                    machine.kill(signal.SIGKILL)
                    machine.process.wait()
                    machine.over = True

    def _all_ended(self) -> bool:
        return self.ordered and not any(machine.running for machine in self.machines)

    def _anybody_left(self) -> bool:
        return any(machine.process.poll() is None for machine in self.machines)

    def _report(self) -> int:
        for note in self.notes:
            self.screen.say(note)
        if self.problem is not None and not self.signals:
            self.screen.say(self.problem)
        return super()._report() or (0 if self.problem is None else 1)


def _meeting_address(machines: Sequence[_Machine]) -> str:
    """An address of the first machine that the others reach: the one that ssh has used; this machine's, as the others see it.

    Raises:  OSError when none is known.
    """
    first, *others = machines
    towards = first.hello.connection.split()[2:3]
    from_here = [word for machine in others for word in machine.hello.connection.split()[:1]]
    for address in [*towards, *from_here, *first.hello.addresses]:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if not parsed.is_loopback and not parsed.is_link_local:
            return address
    if all(machine.here for machine in machines):
        return "127.0.0.1"
    raise OSError(f"no address of {first.host.name} is known that the other machines reach")
