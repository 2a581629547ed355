"""Starts the launcher as people do, and tells afterwards what it left behind."""
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
DEADLINE_S = 30.0


class Launched:
    """A launcher that is running, its stdout to be read line by line, its stderr collected in a file."""

    def __init__(self, argv, folder, environ, prefix=(), **popen):
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.errors = folder / f"stderr-{self.mark}"
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYFLEET_", "SLURM_", "OMP_"))} | environ
        environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "LAUNCHED_BY": self.mark}
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen([*prefix, sys.executable, "-m", "pyfleet", "launch", *argv], cwd=folder,
                                            env=environ, **{"stdout": subprocess.PIPE, "stderr": stderr} | popen)

    def wait_for(self, text):
        """Read stdout up to a line that holds text; return what was read."""
        seen = b""
        while line := self.process.stdout.readline():
            seen += line
            if text.encode() in line:
                return seen
        raise AssertionError(f"the launcher ended without {text!r}: {seen!r} {self.stderr!r}")

    def finish(self, timeout=DEADLINE_S):
        """Wait for the end; return (exit code, the rest of stdout)."""
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out

    @property
    def stderr(self):
        return self.errors.read_bytes()

    def processes(self):
        """The living processes that descend from this launcher, by the mark in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAUNCHED_BY") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self):
        """No process and no directory, within the deadline for those whose end is on its way."""
        until = time.monotonic() + DEADLINE_S
        while (self.processes() or list(self.temporary.iterdir())) and time.monotonic() < until:
            time.sleep(0.01)
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def launch(tmp_path):
    """launch(script text, *options, args=(), environ={}) -> Launched; whatever is left over is killed in the end."""
    started = []

    def launch(script, *options, args=(), environ=None, **popen):
        path = tmp_path / "script.py"
        path.write_text("import os, signal, subprocess, sys, time\nrank = int(os.environ['RANK'])\n" + script)
        started.append(Launched([*map(str, options), path.name, *args], tmp_path, environ or {}, **popen))
        return started[-1]

    yield launch
    for each in started:
        for process in each.processes():
            with contextlib.suppress(psutil.Error):     # it has just ended
                process.send_signal(signal.SIGKILL)
        each.process.wait()
        if each.process.stdout:
            each.process.stdout.close()
