"""The far end of a launch over ssh: starts the ranks of this machine, tells on stdout what they print, ends them on order.

Not for people: pyfleet.launchers.ssh starts it as `python -m pyfleet.commands.remote`, and both speak pyfleet.launchers.base's
frames. When stdin ends or falls silent, so has the one who ordered the ranks: they get SIGHUP, and after the grace SIGKILL.
"""
from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import replace

import msgspec

from pyfleet.config import environment
from pyfleet.errors import ConfigError
from pyfleet.jobs import STDERR, STDOUT, Job, Screen
from pyfleet.launchers.base import ALIVE, BEGIN, Alive, Ended, Failed, Hello, Order, Over, Printed, frame
from pyfleet.launchers.local import LocalRun
from pyfleet.output import Lines


class Frames(Screen):
    """In place of a screen: what ranks print, as frames on stdout."""

    def __init__(self, job: Job):
        super().__init__(replace(job, log_dir=None, panes=None))
        self.err = self.out

    def start(self, rank: int) -> None:
        for stream in (STDOUT, STDERR):     # for last_output alone: it tells an echo from a cause
            self._lines[rank, stream] = Lines(raw=True)

    def take(self, rank: int, stream: int, data: bytes) -> None:
        self._lines[rank, stream].feed(data)
        self.out.write(frame(Printed(rank, stream, data)))

    def ended(self, rank: int, status: int, told: bool) -> None:
        self.out.write(frame(Ended(rank, status, told)))

    def say(self, text: str) -> None:
        """Nobody is here; the launcher says it where people are."""

    def finish_lines(self) -> None:
        self.out.write(frame(Over()))

    def accuse(self, rank: int, status: int) -> None:
        """The launcher does, for it knows all ranks."""


class RemoteRun(LocalRun):
    """A local run that gets its signals from a descriptor, a byte each, from somebody who says ALIVE now and then.

    Args:    silence_s: how long nothing may come before the one who gives the orders is taken for gone.
    """

    def __init__(self, job: Job, screen: Screen, orders: int, silence_s: float):
        super().__init__(job, screen)
        self.orders, self.silence_s = orders, silence_s
        self.heard_at = self.said_at = time.monotonic()
        self.hung_up = False

    def _start(self) -> None:
        os.set_blocking(self.orders, False)
        self.selector.register(self.orders, selectors.EVENT_READ, self._obey)
        super()._start()

    def _obey(self) -> None:
        try:
            orders = os.read(self.orders, 4096)
        except BlockingIOError:
            return
        self.heard_at = time.monotonic()
        if not orders:
            self._hang_up()
        for number in orders:
            if number != ALIVE:
                self.signals += [number] * (2 if number == signal.SIGKILL else 1)

    def _listen(self, now: float) -> None:
        if not self.hung_up and now - self.heard_at > self.silence_s:
            with contextlib.suppress(OSError):      # should the launcher have slept, it can be told
                os.write(STDERR, b"it heard nothing of this launcher for %.3g s\n" % self.silence_s)
            self._hang_up()

    def _patience(self, now: float, drain_until: float | None) -> float:
        return min(super()._patience(now, drain_until), self.silence_s / 4)

    def _hang_up(self) -> None:
        """Nobody is there any more: neither to give orders nor to be shown anything."""
        if not self.hung_up:
            self.hung_up = True
            self.selector.unregister(self.orders)
            self.signals.append(signal.SIGHUP)

    def _notice(self, now: float) -> None:
        self._listen(now)
        if self.hung_up:
            self.screen.out.drop()
        elif now - self.said_at > self.silence_s / 4 and self.screen.out.empty:
            self.said_at = now
            self.screen.out.write(frame(Alive()))
        super()._notice(now)

    def _flush(self) -> None:
        while not self.hung_up and not self.screen.out.empty:
            self._offer()
            for key, _ in self.selector.select(1.0):
                key.data()
            self._listen(time.monotonic())


def main() -> int:
    """Greet, read the job, run it. The exit code says nothing: the frames have said it all."""
    out = sys.stdout.fileno()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.write(out, BEGIN + frame(Hello(socket.gethostname(), environment().get("SSH_CONNECTION", ""), _addresses(), port)))
    text = open(0, "rb", buffering=0, closefd=False).readline()     # noqa: SIM115 unbuffered: what follows are orders
    if not text.endswith(b"\n"):
        return 0                    # not wanted after all
    order = msgspec.json.decode(text, type=Order)
    job = Job(tuple(sys.executable if word is None else word for word in order.command), **order.job)
    try:
        with RemoteRun(job, Frames(job), 0, order.silence_s) as run:
            run.to_its_end()
    except (ConfigError, OSError) as error:
        os.write(out, frame(Failed(str(error))))
    return 0


def _addresses() -> list[str]:
    """This machine's IPv4 addresses that others may reach."""
    import psutil
    return [entry.address for entries in psutil.net_if_addrs().values() for entry in entries
            if entry.family == socket.AF_INET and not entry.address.startswith("127.")]


if __name__ == "__main__":
    sys.exit(main())
