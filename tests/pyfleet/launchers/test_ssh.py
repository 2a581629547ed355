"""Ranks on several machines: a real sshd on each host of a network, and nothing left anywhere however it ends."""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.network import inside
from tests.pyfleet.launchers.conftest import ROOT
from tests.pyfleet.launchers.test_local import FOREVER, GRANDCHILD, READY, by_rank

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
NOISE = "Welcome! You have mail."


def wait_until(true, timeout=30.0):
    """Whether it came true in time."""
    until = time.monotonic() + timeout
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


class Lab:
    """Hosts on a network, with an sshd on each but host 0, where the launcher is; keys and settings of their own."""

    def __init__(self, network, folder, launch, num_hosts):
        self.network, self.folder, self._launch = network(num_hosts), folder, launch
        for name in ("host_key", "user_key", "strange_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        host_key = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text("".join(
            f"{self.address(host)} {' '.join(host_key)}\n" for host in range(1, num_hosts)))
        self.config("user_key")
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)      # where sshd puts those who have not proved themselves
        self.sshd = [self._serve(host) for host in range(1, num_hosts)]

    def config(self, key):
        """What ssh is told: who the hosts are, and with which key to come."""
        (self.folder / "ssh_config").write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder}/{key}\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n")

    def _serve(self, host):
        config = self.folder / f"sshd_{host}"
        config.write_text(
            f"ListenAddress {self.address(host)}\nHostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {self.folder}/user_key.pub\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
            f"KbdInteractiveAuthentication no\n"       # and a login shell that greets
            f"ForceCommand echo '{NOISE}'; eval \"$SSH_ORIGINAL_COMMAND\"\n")
        process = self.network.popen(host, [SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
        assert wait_until(lambda: self._listens(host)), "sshd does not answer"
        return process

    def _listens(self, host):
        with contextlib.suppress(OSError), inside(self.network.namespace(0), socket.socket) as sock:
            sock.settimeout(1)
            sock.connect((self.address(host), 22))
            return True
        return False

    def address(self, host):
        return self.network.address(host)

    def launch(self, script, *options, hosts=None, **popen):
        """The launcher on host 0, by default with one rank on each host that has an sshd."""
        hosts = hosts or ["--hosts", ",".join(self.address(host) for host in range(1, self.network.num_hosts))]
        return self._launch(
            script, *hosts, "--ssh-command", f"ssh -F {self.folder}/ssh_config",
            *(word for name in ("PYTHONPATH", "LAUNCHED_BY", "TMPDIR") for word in ("-x", name)), *options,
            prefix=["nsenter", f"--net={self.network.namespace(0)}", "--"], **popen)


@pytest.fixture
def lab(network, tmp_path, launch):
    """lab(num_hosts) -> Lab"""
    if not Path(SSHD).exists() or not shutil.which("ssh"):
        pytest.skip("needs OpenSSH: ssh and sshd")
    (tmp_path / "lab").mkdir()
    return lambda num_hosts=3: Lab(network, tmp_path / "lab", launch, num_hosts)


def ready(job, ranks):
    seen = b""
    while len(by_rank(seen)) < ranks:
        seen += job.wait_for("ready")


# --- what ranks are told ------------------------------------------------------------------------------------------

@pytest.mark.feature("S20", "A1", "A23")
@pytest.mark.parametrize("slots", [(1, 3), (4, 4)])
def test_one_command_starts_ranks_on_all_hosts_and_they_meet(lab, slots):
    lab = lab()
    job = lab.launch("""
import json, numpy as np, pyfleet
pyfleet.init()
x = np.full(1000, float(rank + 1))
pyfleet.all_reduce(x)
names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR'.split()
print(json.dumps([x.tolist(), os.readlink('/proc/self/ns/net'), *[os.environ[name] for name in names]]))
""", "--nproc", slots[1], hosts=["--hosts", f"{lab.address(1)}:{slots[0]},root@{lab.address(2)}"])
    code, out = job.finish()
    assert code == 0, job.stderr
    size = sum(slots)
    places = [(host, local) for host in (0, 1) for local in range(slots[host])]
    networks = [inside(lab.network.namespace(host), os.readlink, "/proc/thread-self/ns/net") for host in (1, 2)]
    assert {rank: json.loads(lines[0]) for rank, lines in by_rank(out).items()} == {
        rank: [[size * (size + 1) / 2] * 1000, networks[host], str(rank), str(size), str(local), str(slots[host]), str(host), "2",
               lab.address(1)] for rank, (host, local) in enumerate(places)}
    assert NOISE.encode() not in out + job.stderr
    job.assert_nothing_left()


@pytest.mark.feature("S22")
def test_ranks_started_by_hand_meet_by_number_and_hostname(lab, tmp_path):
    lab = lab()
    (tmp_path / "worker.py").write_text("""
import os, sys
import numpy as np, pyfleet
os.environ["MASTER_ADDR"] = sys.argv[2]
pyfleet.init(rank=int(sys.argv[1]), world_size=3)
print(pyfleet.all_reduce_sum(np.array([10.0 ** pyfleet.rank()])).tolist())
""")
    workers = [lab.network.popen(host, [sys.executable, str(tmp_path / "worker.py"), str(host), lab.address(0)],
                                 {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) for host in (2, 0, 1)]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == [b"[111.0]\n"] * 3


def test_training_over_ssh_from_a_hostfile(lab, tmp_path):
    lab = lab()
    (tmp_path / "machines").write_text(f"# two of them\n{lab.address(1)} slots=1\n{lab.address(2)}:1\n")
    job = lab.launch("import runpy; runpy.run_module('pyfleet.examples.digits', run_name='__main__')",
                     hosts=["--hostfile", "machines"], args=["--epochs", "10"])
    code, out = job.finish(120)
    assert code == 0, job.stderr
    assert float(re.search(rb"test accuracy ([\d.]+)", out)[1]) >= 0.95
    assert b"2 ranks" in out
    assert wait_until(lambda: not job.processes())      # torch leaves a directory of its own in TMPDIR


def test_an_entry_that_is_this_machine_needs_no_sshd(lab):
    lab = lab()
    job = lab.launch("print(os.readlink('/proc/self/ns/net'), os.environ['MASTER_ADDR'], 'SSH_CONNECTION' in os.environ)",
                     hosts=["--hosts", f"{lab.address(0)},{lab.address(1)}"], environ={"SSH_CONNECTION": "192.0.2.1 1 192.0.2.2 22"})
    code, out = job.finish()
    assert code == 0, job.stderr
    here = [str(inside(lab.network.namespace(host), os.readlink, "/proc/thread-self/ns/net")) for host in range(2)]
    assert by_rank(out) == {0: [f"{here[0]} {lab.address(0)} False".encode()],
                            1: [f"{here[1]} {lab.address(0)} True".encode()]}
    job.assert_nothing_left()


def command_lines():
    """The command line of every process there is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append("\0".join(process.cmdline()))
    return found


AWKWARD = "two words 'single' \"double\" $HOME `id` \\ back !! \n second line\t\u00fc;&|<>*"


@pytest.mark.parametrize("given", ["none", "variable", "file"])
def test_variables_arrive_as_they_are_and_secrets_show_on_no_command_line(lab, tmp_path, given):
    lab = lab()
    secret = "5ec7e7" * 10 + "abcd"
    environ = {"AWKWARD": AWKWARD, "PYFLEET_IFACE": "eth0"}
    if given == "variable":
        environ["PYFLEET_PSK"] = secret
    elif given == "file":
        (tmp_path / "psk").write_text(secret + "\n")
        (tmp_path / "psk").chmod(0o600)
        (tmp_path / "fleet.json").write_text(json.dumps({"cluster": {"psk_file": "psk"}, "training": {"epochs": 3}}))
    job = lab.launch("""
import json
from pyfleet.config import load_config
from pyfleet.identity import Namespace
training, cluster = load_config()
print(json.dumps([os.environ['AWKWARD'], os.environ['EMPTY'], os.environ['SAID'], os.environ['PYFLEET_PSK'], os.environ['PYFLEET_IFACE'],
                  training.seed, training.epochs, Namespace.configured(cluster).tag, os.environ.get('PYFLEET_PSK_FILE')]))
print('ready', flush=True)""" + FOREVER, "-x", "AWKWARD", "--env", "SAID=a=b c", "-x", "EMPTY=", "--override", "seed=7",
                     *(["--config", "fleet.json", "--override", "training.epochs=4"] if given == "file" else []), environ=environ)
    lines = {}
    while sum(len(each) == 2 for each in lines.values()) < 2:
        for rank, each in by_rank(job.process.stdout.readline()).items():
            lines.setdefault(rank, []).extend(each)
    told = [json.loads(lines[rank][0]) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0][:3] == [AWKWARD, "", "a=b c"]
    assert told[0][4:7] == ["eth0", 7, 4 if given == "file" else 10]
    assert told[0][8] is None
    assert told[0][3] == secret if given != "none" else re.fullmatch("[0-9a-f]{64}", told[0][3])
    shown = command_lines()
    assert any("pyfleet.commands.remote" in line for line in shown), "the processes are there to be seen"
    assert not [line for line in shown if told[0][3] in line or "double" in line]
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 143
    job.assert_nothing_left()


def test_where_and_with_what_it_starts(lab, tmp_path):
    lab = lab(2)
    folder, python = tmp_path / "else where", tmp_path / "python it's"
    folder.mkdir()
    (folder / "script.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:], os.environ['BY'])")
    python.write_text(f'#!/bin/sh\nBY="a wrapper" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = lab.launch("", "--workdir", folder, "--remote-python", python, args=["-n", "2 3"])
    assert job.finish() == (0, f"[rank 0] {folder} ['-n', '2 3'] a wrapper\n".encode()), job.stderr
    job = lab.launch("print(os.getcwd())")
    assert job.finish() == (0, f"[rank 0] {tmp_path}\n".encode())


# --- what is shown ------------------------------------------------------------------------------------------------

def test_output_of_all_hosts_is_marked_whole_and_logged_here(lab, tmp_path):
    job = lab().launch("""
for i in range(3000):
    os.write(1, b'o%d ' % rank); os.write(1, b'%d\\n' % i)
    if i % 100 == 0: os.write(2, b'e%d %d\\n' % (rank, i))
os.write(1, bytes(range(1, 10)) + b'x' * 200_000)""", "--nproc", 2, "--log-dir", "logs")
    code, out = job.finish()
    assert code == 0, job.stderr
    tail = bytes(range(1, 10)) + b"x" * 200_000
    assert by_rank(out) == {rank: [b"o%d %d" % (rank, i) for i in range(3000)] + [tail] for rank in range(4)}
    assert by_rank(job.stderr) == {rank: [b"e%d %d" % (rank, i) for i in range(0, 3000, 100)] for rank in range(4)}
    for rank in range(4):
        log = (tmp_path / f"logs/rank_{rank}.log").read_bytes()
        assert len(log) == sum(len(b"o%d %d\n" % (rank, i)) for i in range(3000)) + 30 * 3 + sum(
            len(b"%d\n" % i) for i in range(0, 3000, 100)) + len(tail)
    job.assert_nothing_left()


def test_without_prefixes_lines_of_several_hosts_are_whole(lab):
    job = lab().launch("for _ in range(300): os.write(1, b'%d' % rank * 500); os.write(1, b'%d' % rank * 500 + b'\\n')", "--no-prefix")
    code, out = job.finish()
    assert code == 0, job.stderr
    assert sorted(out.splitlines()) == [b"0" * 1000] * 300 + [b"1" * 1000] * 300


# --- how a job ends -----------------------------------------------------------------------------------------------

def test_the_first_failure_ends_all_hosts_and_its_traceback_comes_last(lab):
    job = lab().launch("""
if rank == 2:
    raise ValueError('boom')
""" + GRANDCHILD.format("", False) + FOREVER, "--nproc", 2)
    code, _ = job.finish()
    assert code == 1
    assert b"pyfleet-launch: rank 2 failed with exit code 1; its last output:\nTraceback (most recent call last):\n" in job.stderr
    assert job.stderr.endswith(b"ValueError: boom\n")
    job.assert_nothing_left()


@pytest.mark.parametrize("ending,code,words", [
    ("sys.exit(3)", 3, b"rank 1 failed with exit code 3; it printed nothing\n"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, b"rank 1 was killed by SIGKILL; it printed nothing\n"),
])
def test_exit_codes_and_signals_are_passed_on(lab, ending, code, words):
    job = lab().launch(f"if rank == 1: {ending}" + FOREVER)
    assert job.finish()[0] == code
    assert job.stderr.endswith(b"pyfleet-launch: " + words)
    job.assert_nothing_left()


def test_who_only_lost_a_peer_on_another_host_is_not_the_culprit(lab, tmp_path):
    job = lab().launch("""
class PeerLost(Exception): pass
if rank == 0:
    raise PeerLost('rank 1 died')
while not os.path.exists('fail'): time.sleep(0.005)
raise ValueError('the cause')""")
    job.process.stdout.close()
    job.process.stdout = None
    assert wait_until(lambda: b"PeerLost: rank 1 died" in job.stderr)
    (tmp_path / "fail").touch()
    assert job.finish()[0] == 1
    assert job.stderr.endswith(b"ValueError: the cause\n")
    job.assert_nothing_left()


def test_ctrl_c_reaches_every_rank_as_keyboard_interrupt(lab):
    job = lab().launch("try:\n  print('ready', flush=True)\n  while True: time.sleep(1)\n"
                       "except KeyboardInterrupt: print('saved'); sys.exit(0)", "--nproc", 2)
    ready(job, 4)
    job.process.send_signal(signal.SIGINT)
    code, out = job.finish()
    assert (code, by_rank(out)) == (130, {rank: [b"saved"] for rank in range(4)})
    assert b"Ctrl-C again kills" in job.stderr
    job.assert_nothing_left()


def test_a_second_ctrl_c_kills_everywhere_at_once(lab):
    job = lab().launch("signal.signal(signal.SIGINT, lambda *_: print('stubborn', flush=True))\n" + READY)
    ready(job, 2)
    begin = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    job.wait_for("stubborn")
    time.sleep(0.3)         # what comes sooner is taken for the same Ctrl-C, passed on by a wrapper
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    assert time.monotonic() - begin < 10, "not the 15 s of grace"
    job.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_or_killed_leaves_nothing_anywhere(lab, number):
    job = lab().launch(GRANDCHILD.format("", False) + GRANDCHILD.format("signal.signal(signal.SIGHUP, signal.SIG_IGN);", True)
                       + READY, "--nproc", 2, "--timeout-grace", "1")
    ready(job, 4)
    assert wait_until(lambda: len(job.processes()) >= 4 * 3 + 2 * 2 + 3), "ranks and grandchildren, the far ends, ssh"
    job.process.send_signal(number)
    assert job.finish()[0] == (143 if number == signal.SIGTERM else -number)
    job.assert_nothing_left()


def test_a_cut_network_ends_the_job_at_both_ends(lab):
    lab = lab()
    job = lab.launch("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + READY, "--timeout-grace", "1",
                     environ={"PYFLEET_CONNECTION_TIMEOUT_MS": "1000"})
    ready(job, 2)
    lab.network.cut(2)
    code, _ = job.finish()
    assert code == 1
    assert re.fullmatch(rb"pyfleet-launch: lost 10\.77\.0\.3: .*not responding\.\n", job.stderr), job.stderr
    job.assert_nothing_left()       # on the host that was cut off, too, where nobody could say so


def test_a_cut_network_is_noticed_though_ssh_does_not_watch(lab):
    lab = lab()
    with (lab.folder / "ssh_config").open("a") as config:
        config.write("  LogLevel QUIET\n")
    job = lab.launch(READY, "--ssh-command", f"ssh -F {lab.folder}/ssh_config -o ServerAliveInterval=0",
                     environ={"PYFLEET_CONNECTION_TIMEOUT_MS": "1000"})
    ready(job, 2)
    lab.network.cut(2)
    assert job.finish()[0] == 1
    assert job.stderr == b"pyfleet-launch: lost 10.77.0.3: nothing was heard of it for 5 s\n"
    job.assert_nothing_left()


def test_a_reader_that_pauses_is_not_silence(lab):
    job = lab().launch("for i in range(6000): os.write(1, b'%0999d\\n' % i)", environ={"PYFLEET_CONNECTION_TIMEOUT_MS": "1000"})
    job.wait_for("[rank")
    time.sleep(6)           # this is how long it pauses: longer than either end waits for the other
    code, out = job.finish()
    assert code == 0, job.stderr
    assert out.count(b"\n") == 2 * 6000 - 1


def ranks_left(job):
    """The ranks that are running, and what they have started."""
    found = []
    for process in job.processes():
        with contextlib.suppress(psutil.Error):
            if "RANK" in process.environ():
                found.append(process)
    return found


def test_a_launcher_that_sleeps_too_long_is_told_so(lab):
    job = lab().launch(READY, environ={"PYFLEET_CONNECTION_TIMEOUT_MS": "500"})
    ready(job, 2)
    job.process.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: not ranks_left(job))
    job.process.send_signal(signal.SIGCONT)
    assert job.finish()[0] == 1
    assert b": it heard nothing of this launcher for 1.5 s\n" in job.stderr
    job.assert_nothing_left()


def test_a_session_that_dies_ends_the_job(lab):
    lab = lab()
    job = lab.launch(READY)
    ready(job, 2)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["sshd: root@notty"] and lab.sshd[0].pid in [each.pid for each in process.parents()]:
                process.kill()
    assert job.finish()[0] == 1
    assert b"pyfleet-launch: lost 10.77.0.2: " in job.stderr
    job.assert_nothing_left()


def test_a_far_end_that_is_killed_ends_the_job(lab):
    lab = lab()
    job = lab.launch(GRANDCHILD.format("", False) + READY, "--nproc", 2)
    ready(job, 4)
    far = [process for process in job.processes() if "pyfleet.commands.remote" in process.cmdline()]
    assert len(far) == 2
    far[0].kill()
    assert job.finish()[0] == 1
    assert re.search(rb"pyfleet-launch: lost 10\.77\.0\.[23]: ", job.stderr)
    job.assert_nothing_left()


# --- hosts that do not work ---------------------------------------------------------------------------------------

def refusal(job, words):
    """The job has not begun, says so in one line, and left nothing."""
    code, out = job.finish()
    assert (code, out) == (1, b"")
    assert re.fullmatch(rb"pyfleet-launch: cannot start ranks on [^\n]*: " + words + rb"\n", job.stderr), job.stderr
    job.assert_nothing_left()


def test_a_host_without_sshd(lab):
    lab = lab()
    lab.sshd[1].terminate()
    lab.sshd[1].wait()
    refusal(lab.launch(READY), rb"ssh: connect to host 10\.77\.0\.3 port 22: Connection refused")


def test_a_host_that_is_not_there(lab):
    lab = lab()
    lab.network.cut(2)
    refusal(lab.launch(READY, environ={"PYFLEET_CONNECTION_TIMEOUT_MS": "3000"}),
            rb"ssh: connect to host 10\.77\.0\.3 port 22: .*")


def test_a_key_that_opens_nothing(lab):
    lab = lab()
    lab.config("strange_key")
    refusal(lab.launch(READY), rb"root@10\.77\.0\.[23]: Permission denied \(publickey\)\.")


def test_a_host_that_is_not_the_one_we_know(lab):
    lab = lab()
    strange = (lab.folder / "strange_key.pub").read_text().split()[:2]
    (lab.folder / "known_hosts").write_text(f"{lab.address(1)},{lab.address(2)} {' '.join(strange)}\n")
    refusal(lab.launch(READY), rb"Host key verification failed\.")


def test_a_host_without_python_or_the_folder_or_a_port(lab):
    lab = lab(2)
    refusal(lab.launch(READY, "--remote-python", "/no/such python"), rb"there is no Python at /no/such python")
    refusal(lab.launch(READY, "--workdir", "/no/such folder"), rb"FileNotFoundError: .*: '/no/such folder'")
    refusal(lab.launch(READY, "--ssh-port", "23"), rb"ssh: connect to host 10\.77\.0\.2 port 23: Connection refused")


def test_a_program_that_cannot_be_started_there(lab):
    lab = lab()
    job = lab.launch("", "--workdir", "/", "--no-python", "/no/such/program")
    code, out = job.finish()
    assert (code, out) == (1, b"")
    assert re.fullmatch(rb"pyfleet-launch: cannot start ranks on [^\n]*: .*No such file or directory: '/no/such/program'\n", job.stderr), job.stderr
    job.assert_nothing_left()
