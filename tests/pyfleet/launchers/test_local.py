"""Ranks on one machine: what is shown, how a job ends, and that nothing stays behind."""
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pyfleet.jobs import Job, Screen
from pyfleet.launchers.local import LocalRun

linux = pytest.mark.skipif(sys.platform != "linux", reason="adopting orphans takes Linux")

FOREVER = "\nwhile True: time.sleep(1)\n"
READY = "print('ready', flush=True)" + FOREVER


def by_rank(out):
    """rank -> the lines it printed."""
    found = {}
    for line in out.splitlines():
        rank, text = re.fullmatch(rb"\[rank (\d+)\] (.*)", line, re.DOTALL).groups()
        found.setdefault(int(rank), []).append(text)
    return found


# --- what ranks are told ------------------------------------------------------------------------------------------

@pytest.mark.feature("A26", "A27", "A28", "A29", "A30")
def test_every_rank_gets_the_whole_environment(launch):
    job = launch("import json; print(json.dumps(dict(os.environ)))", "--nproc", 3)
    code, out = job.finish()
    assert code == 0
    ranks = {rank: eval(lines[0]) for rank, lines in by_rank(out).items()}
    assert sorted(ranks) == [0, 1, 2]
    for rank, environ in ranks.items():
        assert {name: environ[name] for name in (
            "RANK", "LOCAL_RANK", "ROLE_RANK", "PYFLEET_RANK", "PYFLEET_LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
            "ROLE_WORLD_SIZE", "PYFLEET_WORLD_SIZE", "PYFLEET_LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
            "ROLE_NAME", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "PYTHONUNBUFFERED",
        )} == {
            **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK", "PYFLEET_RANK", "PYFLEET_LOCAL_RANK"), str(rank)),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "PYFLEET_WORLD_SIZE",
                             "PYFLEET_LOCAL_WORLD_SIZE"), "3"),
            "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "PYTHONUNBUFFERED": "1"}
        assert environ["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYFLEET_RENDEZVOUS"):
        assert len({environ[name] for environ in ranks.values()}) == 1
    assert 1024 <= int(ranks[0]["MASTER_PORT"]) <= 65535


def test_the_user_s_own_variables_are_left_alone(launch):
    job = launch("print(os.environ['OMP_NUM_THREADS'], os.environ['MASTER_PORT'], os.environ['MINE'])", "--master-port",
                 "1234", environ={"OMP_NUM_THREADS": "7", "MINE": "yes"})
    assert job.finish() == (0, b"[rank 0] 7 1234 yes\n")


def test_ranks_meet_in_a_private_directory_that_is_gone_afterwards(launch):
    job = launch("""
path = os.environ['PYFLEET_RENDEZVOUS'].removeprefix('file://')
open(f'{path}/{rank}', 'w').close()
print(path, oct(os.stat(path).st_mode))""", "--nproc", 2)
    code, out = job.finish()
    path, mode = by_rank(out)[0][0].split()
    assert (code, stat.S_IMODE(int(mode, 8))) == (0, 0o700)
    assert Path(path.decode()).parent == job.temporary
    job.assert_nothing_left()


def test_ranks_read_nothing_and_lead_sessions_of_their_own(launch):
    job = launch("print(repr(sys.stdin.read()), os.getsid(0) == os.getpid() == os.getpgid(0))", "--nproc", 2,
                 stdin=subprocess.PIPE)
    job.process.stdin.write(b"for nobody\n")
    job.process.stdin.flush()
    assert by_rank(job.finish()[1]) == {0: [b"'' True"], 1: [b"'' True"]}


@pytest.mark.feature("S35")
def test_settings_reach_the_ranks(launch, tmp_path):
    (tmp_path / "fleet.yaml").write_text("training: {epochs: 3, seed: 3}\n")
    job = launch("""
os.chdir('/')
from pyfleet.config import load_config
training, cluster = load_config()
print(training.epochs, training.seed, cluster.timeout)""",
                 "--config", "fleet.yaml", "--override", "training.seed=4", "--override=cluster.timeout=5", "--nproc", 2)
    assert by_rank(job.finish()[1]) == {0: [b"3 4 5.0"], 1: [b"3 4 5.0"]}


# --- what is shown ------------------------------------------------------------------------------------------------

def test_lines_are_marked_whole_and_in_order_and_streams_stay_apart(launch):
    job = launch("""
for i in range(2000):
    os.write(1, b'o%d ' % rank); os.write(1, b'%d\\n' % i)
    if i % 100 == 0: os.write(2, b'e%d %d\\n' % (rank, i))""", "--nproc", 3)
    code, out = job.finish()
    assert code == 0
    assert by_rank(out) == {rank: [b"o%d %d" % (rank, i) for i in range(2000)] for rank in range(3)}
    assert by_rank(job.stderr) == {rank: [b"e%d %d" % (rank, i) for i in range(0, 2000, 100)] for rank in range(3)}


def test_one_reader_of_both_streams_sees_whole_lines(launch):
    job = launch("""
for i in range(60):
    os.write(1, b'o' * 9000 + b'\\n'); os.write(2, b'e' * 9000 + b'\\n')""", "--nproc", 2, stderr=subprocess.STDOUT)
    out = b""
    while piece := job.process.stdout.read(10_000):
        out += piece
        time.sleep(0.001)       # so slow that lines wait half written
    assert job.finish()[0] == 0
    assert sorted(out.splitlines()) == sorted(b"[rank %d] " % rank + letter * 9000 for rank in (0, 1)
                                              for letter in (b"o", b"e") for _ in range(60))


def test_a_last_line_without_an_end_is_shown(launch):
    job = launch("sys.stdout.write('no end'); sys.stderr.write('none here'); sys.stdout.flush()")
    assert job.finish() == (0, b"[rank 0] no end\n")
    assert job.stderr == b"[rank 0] none here\n"


def test_ten_megabytes_are_shown_whole_and_quickly(launch):
    job = launch("""
line = bytes(range(32, 127)) * 10 + b'\\n'
for _ in range(10_500): os.write(1, line)""", "--nproc", 2)
    begin = time.monotonic()
    code, out = job.finish()
    assert code == 0
    assert by_rank(out) == dict.fromkeys((0, 1), [bytes(range(32, 127)) * 10] * 10_500)
    assert time.monotonic() - begin < 10, "20 MB take well under a second on an idle machine"


def test_ten_megabytes_without_a_line_end_are_shown_whole(launch):
    job = launch("for _ in range(160): os.write(1, b'x' * 65536)")
    code, out = job.finish()
    assert code == 0
    assert b"".join(by_rank(out)[0]) == b"x" * (160 * 65536)


def test_a_slow_reader_loses_nothing_and_costs_bounded_memory(launch):
    job = launch("for i in range(6_000): os.write(1, b'%09999d\\n' % i)")
    watched, most, out = psutil.Process(job.process.pid), 0, bytearray()
    while piece := job.process.stdout.read(1 << 16):
        out += piece
        time.sleep(0.002)       # this is how slow it is
        most = max(most, watched.memory_info().rss if watched.is_running() else 0)
    assert job.finish()[0] == 0
    assert by_rank(bytes(out)) == {0: [b"%09999d" % i for i in range(6_000)]}
    assert most < 50e6, "60 MB went through"


def test_output_that_is_not_utf8_passes_as_it_is(launch):
    noise = bytes(set(range(256)) - {10, 13})
    job = launch(f"os.write(1, {noise!r} + b'\\n')")
    assert job.finish() == (0, b"[rank 0] " + noise + b"\n")


def test_a_progress_bar_is_shown_now_and_then_and_in_the_end(launch):
    job = launch("""
for i in range(1001):
    os.write(2, b'\\r%d/1000' % i)
os.write(2, b'\\nend\\r\\n')""")
    assert job.finish()[0] == 0
    lines = by_rank(job.stderr)[0]
    assert lines[-2:] == [b"1000/1000", b"end"]
    assert len(lines) < 20
    assert b"\r" not in job.stderr


def test_no_prefix_and_log_dir(launch, tmp_path):
    job = launch("os.write(1, b'out\\r'); os.write(2, b'err %d' % rank)", "--nproc", 2, "--no-prefix", "--log-dir", "logs/deep")
    assert job.finish() == (0, b"out\nout\n")
    assert sorted(job.stderr.splitlines()) == [b"err 0", b"err 1"]
    for rank in (0, 1):
        log = (tmp_path / f"logs/deep/rank_{rank}.log").read_bytes()
        assert sorted(log.split(b"\r")) in ([b"err %d" % rank, b"out"], [b"", b"err %dout" % rank])


def test_colour_only_for_a_terminal(launch):
    master, slave = pty.openpty()
    job = launch("print('hello')", "--nproc", 2, stdout=slave)
    assert job.finish()[0] == 0
    os.close(slave)
    shown = os.read(master, 4096)
    os.close(master)
    assert sorted(shown.split()) == sorted(b"\x1b[36m[rank 0]\x1b[0m hello \x1b[33m[rank 1]\x1b[0m hello".split())


# --- how a job ends -----------------------------------------------------------------------------------------------

def test_the_first_failure_ends_the_others_and_its_traceback_comes_last(launch):
    job = launch("""
if rank == 1:
    raise ValueError('boom')
""" + FOREVER, "--nproc", 3)
    code, _ = job.finish()
    header = b"pyfleet-launch: rank 1 failed with exit code 1; its last output:\nTraceback (most recent call last):\n"
    assert code == 1
    assert header in job.stderr
    assert job.stderr.endswith(b"ValueError: boom\n")
    assert b"[rank" not in job.stderr[job.stderr.index(header):]
    job.assert_nothing_left()


@pytest.mark.parametrize("ending,code,words", [
    ("sys.exit(3)", 3, b"rank 1 failed with exit code 3; it printed nothing\n"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, b"rank 1 was killed by SIGKILL; it printed nothing\n"),
    ("os.abort()", 134, b"rank 1 was killed by SIGABRT; it printed nothing\n"),
    ("print('only stdout'); sys.exit(255)", 255, b"rank 1 failed with exit code 255; its last output:\nonly stdout\n"),
    ("sys.exit('no newline')", 1, b"rank 1 failed with exit code 1; its last output:\nno newline\n"),
])
def test_exit_codes_and_signals_are_passed_on(launch, ending, code, words):
    job = launch(f"if rank == 1: {ending}" + FOREVER, "--nproc", 2)
    assert job.finish()[0] == code
    assert job.stderr.endswith(b"pyfleet-launch: " + words)
    job.assert_nothing_left()


def test_ranks_that_end_well_are_not_hurried(launch):
    job = launch("""
if rank == 0: sys.exit(0)
path = os.environ['PYFLEET_RENDEZVOUS'].removeprefix('file://')
print('waiting', flush=True)
while not os.path.exists(f'{path}/go'): time.sleep(0.01)
print('done')""", "--nproc", 2)
    job.wait_for("waiting")
    next(job.temporary.iterdir()).joinpath("go").touch()
    assert job.finish() == (0, b"[rank 1] done\n")


ECHO = """
class PeerLost(Exception): pass
path = os.environ['PYFLEET_RENDEZVOUS'].removeprefix('file://')
def wait(name):
    while not os.path.exists(f'{path}/{name}'): time.sleep(0.005)
def show(name): open(f'{path}/{name}', 'w').close()
"""


@pytest.mark.parametrize("echo", ["PeerLost('rank 1 died')", "RuntimeError('callback: PeerLost: rank 1')"])
def test_who_only_lost_a_peer_is_not_the_culprit_even_when_it_ends_first(launch, echo):
    job = launch(ECHO + f"""
if rank == 0:
    wait('failing')
    import atexit; atexit.register(show, 'over')
    raise {echo}
show('failing')
try:
    raise ValueError('the cause')
finally:
    import atexit
    atexit.register(lambda: (wait('over'), time.sleep(0.2)))     # rank 0 is gone before this rank is torn down
""", "--nproc", 2)
    assert job.finish()[0] == 1
    assert job.stderr.endswith(b"ValueError: the cause\n")
    assert b"rank 1 failed" in job.stderr


def test_a_lost_peer_is_the_culprit_when_nobody_else_failed(launch):
    job = launch("class PeerLost(Exception): pass\nif rank == 0: raise PeerLost('rank 7')" + FOREVER, "--nproc", 2)
    assert job.finish()[0] == 1
    assert job.stderr.endswith(b"PeerLost: rank 7\n")


def test_a_long_traceback_is_shown_from_its_beginning(launch):
    job = launch("""
sys.setrecursionlimit(120)
def a(): b()
def b(): a()
print('noise\\n' * 100, file=sys.stderr)
import sys; sys.tracebacklimit = 1000
def odd(n): even(n - 1) if n else 1 / 0
def even(n): odd(n - 1)
odd(60)""")
    assert job.finish()[0] == 1
    shown = job.stderr[job.stderr.index(b"its last output:\n"):].splitlines()
    assert shown[1] == b"Traceback (most recent call last):"
    assert shown[-1] == b"ZeroDivisionError: division by zero"
    assert len(shown) > 60


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(launch):
    job = launch("""
signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))
path = os.environ['PYFLEET_RENDEZVOUS'].removeprefix('file://') + '/deaf'
if rank == 1:
    while not os.path.exists(path): time.sleep(0.005)
    sys.exit(5)
open(path, 'w').close()""" + FOREVER, "--nproc", 2, "--timeout-grace", "0.5")
    begin = time.monotonic()
    assert job.finish() == (5, b"[rank 0] no\n")
    assert 0.5 <= time.monotonic() - begin < 10
    job.assert_nothing_left()


GRANDCHILD = "subprocess.Popen([sys.executable, '-c', 'import signal, time; {} time.sleep(1000)'], start_new_session={})\n"


@pytest.mark.parametrize("deaf", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN);"])
@pytest.mark.parametrize("session", [False, pytest.param(True, marks=linux)])
@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_grandchildren_end_with_the_job_however_it_ends(launch, deaf, session, ending):
    job = launch(GRANDCHILD.format(deaf, session) + ending, "--nproc", 2, "--timeout-grace", "0.3")
    assert job.finish()[0] == {"": 0, "sys.exit(3)": 3}.get(ending, 137)
    assert job.processes() == []
    job.assert_nothing_left()


def test_a_stopped_rank_ends_too(launch):
    job = launch("""
import psutil
path = os.environ['PYFLEET_RENDEZVOUS'].removeprefix('file://') + '/pid'
if rank == 0:
    with open(path + '.new', 'w') as file: file.write(str(os.getpid()))
    os.rename(path + '.new', path)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)
while not os.path.exists(path): time.sleep(0.005)
while psutil.Process(int(open(path).read())).status() != 'stopped': time.sleep(0.005)
sys.exit(4)""", "--nproc", 2)
    begin = time.monotonic()
    assert job.finish()[0] == 4
    assert time.monotonic() - begin < 10, "long before the grace is over"
    job.assert_nothing_left()


# --- signals to the launcher --------------------------------------------------------------------------------------

def ready(job, ranks):
    seen = b""
    while len(by_rank(seen)) < ranks:
        seen += job.wait_for("ready")


def test_ctrl_c_reaches_every_rank_as_keyboard_interrupt(launch):
    job = launch("try:\n  print('ready', flush=True)\n  while True: time.sleep(1)\n"
                 "except KeyboardInterrupt: print('saved'); sys.exit(0)", "--nproc", 3)
    ready(job, 3)
    job.process.send_signal(signal.SIGINT)
    code, out = job.finish()
    assert (code, by_rank(out)) == (130, {rank: [b"saved"] for rank in range(3)})
    assert b"Ctrl-C again kills" in job.stderr
    job.assert_nothing_left()


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_reach_every_rank(launch, number, code):
    job = launch(f"signal.signal({int(number)}, lambda *_: (print('told', flush=True), os._exit(0)))\n" + READY, "--nproc", 2)
    ready(job, 2)
    job.process.send_signal(number)
    ended, out = job.finish()
    assert (ended, by_rank(out)) == (code, {0: [b"told"], 1: [b"told"]})
    job.assert_nothing_left()


def test_a_second_ctrl_c_kills_at_once(launch):
    job = launch("signal.signal(signal.SIGINT, lambda *_: print('stubborn', flush=True))\n" + READY, "--nproc", 2)
    ready(job, 2)
    begin = time.monotonic()
    job.process.send_signal(signal.SIGINT)
    job.wait_for("stubborn")
    time.sleep(0.3)         # what comes sooner is taken for the same Ctrl-C, passed on by a wrapper
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    assert time.monotonic() - begin < 10, "not the 15 s of grace"
    job.assert_nothing_left()


def test_a_ctrl_c_that_arrives_twice_at_once_counts_once():
    job = Job(("true",))
    run = LocalRun(job, Screen(job))
    run._note(signal.SIGINT, None)
    run._note(signal.SIGINT, None)
    assert run.signals == [signal.SIGINT]
    run.signalled_at -= 1
    run._note(signal.SIGINT, None)
    assert run.signals == [signal.SIGINT, signal.SIGINT]


def test_ctrl_c_reaches_grandchildren_and_their_last_words_are_shown(launch):
    child = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit('late')); print('ready', flush=True); time.sleep(1000)"
    job = launch(f"subprocess.Popen([sys.executable, '-c', {child!r}])" + FOREVER)
    ready(job, 1)
    job.process.send_signal(signal.SIGINT)
    assert job.finish()[0] == 130
    assert b"late" in job.stderr        # beside what the rank itself writes there at the same time
    job.assert_nothing_left()


def test_a_guardian_that_is_killed_is_not_missed(launch):
    job = launch(READY)
    ready(job, 1)
    guardian = next(child for child in psutil.Process(job.process.pid).children() if "-I" in child.cmdline())
    guardian.kill()
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 143
    job.assert_nothing_left()


def test_nohup_is_respected(launch):
    job = launch("print('ready', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('done')",
                 preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    ready(job, 1)
    job.process.send_signal(signal.SIGHUP)
    (job.temporary.parent / "go").touch()
    assert job.finish() == (0, b"[rank 0] done\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_a_launcher_that_is_killed_leaves_nothing(launch, number):
    job = launch(GRANDCHILD.format("", False) + GRANDCHILD.format("signal.signal(signal.SIGTERM, signal.SIG_IGN);", False)
                 + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY, "--nproc", 2)
    ready(job, 2)
    until = time.monotonic() + 30
    while len(job.processes()) < 2 * 3 + 2 and time.monotonic() < until:    # a process in exec shows no environment
        time.sleep(0.01)
    assert len(job.processes()) == 2 * 3 + 2, "ranks and grandchildren, the launcher and its guardian"
    job.process.send_signal(number)
    assert job.finish()[0] == -number
    job.assert_nothing_left()


def test_a_reader_that_goes_away_ends_the_job(launch):
    job = launch("while True: print('line', flush=True)", "--nproc", 2)
    job.process.stdout.readline()
    job.process.stdout.close()
    assert job.process.wait(timeout=30) == 141
    job.assert_nothing_left()


def test_closed_standard_streams_do_no_harm(launch, tmp_path):
    job = launch("print('hello'); print('there', file=sys.stderr)", "--log-dir", "logs", stdout=None, stderr=None,
                 preexec_fn=lambda: [os.close(fd) for fd in (0, 1, 2)])
    assert job.finish()[0] == 0
    assert sorted((tmp_path / "logs/rank_0.log").read_bytes().split()) == [b"hello", b"there"]
