"""The command line of pyfleet-launch: what it accepts, and one clear line for what it does not."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyfleet.commands import COMMANDS, main
from pyfleet.commands import launch as command
from pyfleet.hosts import Host

ROOT = Path(__file__).parents[3]


class Recorder:
    """Stands in for a launcher: keeps the job, and for which hosts it is."""

    def __init__(self, hosts=None, reach=None):
        Recorder.hosts, Recorder.reach = hosts, reach

    def run(self, job):
        Recorder.job = job
        return 7


@pytest.fixture
def job(monkeypatch, tmp_path):
    """job(*argv) -> the Job that the command line describes, run in a folder with train.py and package/."""
    (tmp_path / "train.py").touch()
    (tmp_path / "package" / "inner").mkdir(parents=True)
    for name in ("package/__init__.py", "package/__main__.py", "package/digits.py", "package/inner/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('imported')\n")
    for name in ("PYFLEET_CONFIG", "PYFLEET_OVERRIDES", "PYFLEET_PSK", "PYFLEET_PSK_FILE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(command, "LocalLauncher", Recorder)
    monkeypatch.setattr(command, "SshLauncher", Recorder)
    importlib.invalidate_caches()

    def job(*argv):
        assert command.main(list(argv)) == 7
        return Recorder.job
    return job


def test_defaults(job):
    got = job("train.py")
    assert got.command == (sys.executable, "train.py")
    assert (got.num_ranks, got.grace_s, got.master_port, got.log_dir, got.prefix, got.config_path, got.overrides) == (
        1, 15.0, None, None, True, None, ())


@pytest.mark.parametrize("argv", [
    ["--nproc", "4"], ["--nproc=4"], ["--nproc-per-node", "4"], ["--nproc_per_node=4"], ["-n", "4"], ["-n4"],
    ["--standalone", "--nproc-per-node=4"],
])
def test_how_many_ranks_in_every_spelling(job, argv):
    assert job(*argv, "train.py").num_ranks == 4


def test_auto_is_one_rank_per_accelerator_or_core(job, monkeypatch):
    monkeypatch.setattr(command, "_num_accelerators", lambda: 0)
    assert job("--nproc", "auto", "train.py").num_ranks == command.num_cores()
    monkeypatch.setattr(command, "_num_accelerators", lambda: 3)
    assert job("--nproc", "auto", "train.py").num_ranks == 3
    assert job("--nproc", "gpu", "train.py").num_ranks == 3
    assert job("--nproc", "cpu", "train.py").num_ranks == command.num_cores()


def test_accelerators_are_those_made_visible(monkeypatch):
    for visible, expected in (("0,2", 2), ("", 0), ("-1", 0), ("GPU-8932f937", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert command._num_accelerators() == expected


def test_every_option(job, tmp_path):
    (tmp_path / "fleet.yaml").write_text("training: {epochs: 3}\n")
    got = job("--config", "fleet.yaml", "--override", "seed=1", "--override=training.epochs=2", "--log_dir", "logs",
              "--no-prefix", "--timeout-grace", "2.5", "--master_port", "1234", "train.py")
    assert (got.grace_s, got.master_port, got.log_dir, got.prefix) == (2.5, 1234, "logs", False)
    assert (got.config_path, got.overrides) == ("fleet.yaml", ("seed=1", "training.epochs=2"))


@pytest.mark.parametrize("argv,rest", [
    (["train.py", "--nproc", "3", "-m", "--unknown", "--", "x"], ["--nproc", "3", "-m", "--unknown", "--", "x"]),
    (["--", "train.py", "--", "-x"], ["--", "-x"]),
    (["-n", "2", "train.py", "-"], ["-"]),
])
def test_what_follows_the_script_belongs_to_it(job, argv, rest):
    assert job(*argv).command == (sys.executable, "train.py", *rest)


@pytest.mark.parametrize("flag", ["-m", "--module"])
def test_modules_are_found_without_importing_them(job, flag):
    assert job(flag, "package.digits", "--epochs", "1").command == (sys.executable, "-m", "package.digits", "--epochs", "1")
    assert job("-n", "2", flag, "package").command == (sys.executable, "-m", "package")
    assert "package" not in sys.modules


def test_programs(job):
    assert job("--no-python", "echo", "a").command == ("echo", "a")


def test_overrides_of_the_environment_come_first(job, monkeypatch):
    monkeypatch.setenv("PYFLEET_OVERRIDES", '["seed=1"]')
    assert job("--override", "seed=2", "train.py").overrides == ("seed=1", "seed=2")


def test_chosen_variables(job, monkeypatch):
    monkeypatch.setenv("MINE", "a b")
    got = job("-x", "MINE", "--env", "X=1=2", "--env=EMPTY=", "train.py")
    assert got.environment == (("MINE", "a b"), ("X", "1=2"), ("EMPTY", ""))
    assert Recorder.hosts is None


def test_hosts(job, tmp_path, monkeypatch):
    for name, value in (("PYFLEET_TIMEOUT", "5"), ("PYFLEET_RANK", "3"), ("PYFLEET_CONNECTION_TIMEOUT_MS", "1500")):
        monkeypatch.setenv(name, value)
    got = job("--hosts", "a,ann@b:2", "-n3", "--ssh-command", "sh -F 'my config'", "--ssh_port=2222", "--workdir", "there",
              "--remote-python", "python3.12", "-x", "X=1", "not/here.py")
    assert (Recorder.hosts, got.num_ranks, got.command) == ([Host("a"), Host("b", "ann", 2)], 3, (sys.executable, "not/here.py"))
    reach = Recorder.reach
    assert (reach.ssh, reach.port, reach.python, reach.folder) == (["sh", "-F", "my config"], 2222, "python3.12", "there")
    assert (reach.timeout_s, reach.silence_s, reach.start_s) == (1.5, 4.5, 30.0)
    assert re.fullmatch("[0-9a-f]{64}", reach.environment["PYFLEET_PSK"])
    assert reach.environment["PYFLEET_TIMEOUT"] == "5"
    assert reach.environment["X"] == "1"
    assert "PYFLEET_RANK" not in reach.environment
    assert reach.environment["PYFLEET_PSK"] not in repr(reach)
    first = reach.environment["PYFLEET_PSK"]
    (tmp_path / "machines").write_text("a slots=4\nb:1\n")
    assert job("--hostfile", "machines", "--nproc", "auto", "train.py").config is None
    assert Recorder.hosts == [Host("a", slots=4), Host("b", slots=1)]
    assert Recorder.reach.environment["PYFLEET_PSK"] != first
    job("--hosts", "a", "train.py")
    assert "PYFLEET_PSK" not in Recorder.reach.environment, "ranks of one host need none"


def test_tmux(job, monkeypatch):
    class InSession(Recorder):
        def __init__(self, argv, rest, titles):
            InSession.made = argv, rest, titles
    monkeypatch.setattr(command, "TmuxLauncher", InSession)
    job("--tmux", "-n2", "--hosts", "a:3,b", "train.py", "--tmux")
    assert InSession.made == ([sys.executable, "-m", "pyfleet", "launch", "--panes"],
                              ["-n2", "--hosts", "a:3,b", "--", "train.py", "--tmux"],
                              [f"rank {rank} on {host}" for rank, host in enumerate("aaabb")])
    job("--tmux", "-n2", "-m", "package")
    assert InSession.made[1] == ["-n2", "-m", "--", "package"]
    assert [title.split(" on ")[0] for title in InSession.made[2]] == ["rank 0", "rank 1"]
    job("--tmux", "--join", "-n2", "train.py")
    assert [title.split(" on ")[0] for title in InSession.made[2]] == ["local rank 0", "local rank 1"]


def test_settings_go_along_as_content_and_secrets_apart(job, tmp_path, monkeypatch):
    (tmp_path / "fleet.yaml").write_text("training: {epochs: 3}\ncluster: {psk: from the file, timeout: 7}\n")
    got = job("--hosts", "a,b", "--config", "fleet.yaml", "--override", "seed=1", "train.py")
    assert json.loads(got.config) == {"training": {"epochs": 3}, "cluster": {"timeout": 7}}
    assert (got.config_path, got.overrides, Recorder.reach.environment["PYFLEET_PSK"]) == (None, ("seed=1",), "from the file")
    monkeypatch.setenv("PYFLEET_CONFIG", "fleet.yaml")
    got = job("--hosts", "a", "--override", "cluster.psk=said last", "--override", "psk = or so", "train.py")
    assert (got.overrides, Recorder.reach.environment["PYFLEET_PSK"]) == ((), "or so")
    assert "PYFLEET_CONFIG" not in Recorder.reach.environment
    assert "said last" not in repr(got) + repr(Recorder.reach)


@pytest.mark.parametrize("argv,message", [
    ([], "nothing to run: name a script, or a module after -m"),
    (["-m"], "nothing to run: name a script, or a module after -m"),
    (["--nproc", "2"], "nothing to run: name a script, or a module after -m"),
    (["--nproc"], "argument --nproc/--nproc-per-node/-n: expected one argument"),
    (["--nproc", "0", "train.py"], "--nproc must be a number >= 1, or auto, got '0'"),
    (["--nproc", "-1", "train.py"], "--nproc must be a number >= 1, or auto, got '-1'"),
    (["--nproc=many", "train.py"], "--nproc must be a number >= 1, or auto, got 'many'"),
    (["--nproc=1.5", "train.py"], "--nproc must be a number >= 1, or auto, got '1.5'"),
    (["--nprc", "2", "train.py"], "unknown option --nprc; did you mean --nproc?"),
    (["--overide=seed=1", "train.py"], "unknown option --overide; did you mean --override?"),
    (["-z", "train.py"], "unknown option -z"),
    (["--timeout-grace", "-1", "train.py"], "--timeout-grace must be a number of seconds >= 0, got '-1'"),
    (["--timeout-grace", "nan", "train.py"], "--timeout-grace must be a number of seconds >= 0, got 'nan'"),
    (["--master-port", "0", "train.py"], "--master-port must be a port from 1 to 65535, got '0'"),
    (["trian.py"], "script 'trian.py' does not exist; did you mean train.py?"),
    (["package/digit.py"], "script 'package/digit.py' does not exist; did you mean package/digits.py?"),
    (["nothing/like/it.py"], "script 'nothing/like/it.py' does not exist; nor does the folder 'nothing/like'"),
    (["qqq"], "script 'qqq' does not exist"),
    (["package"], "'package' is a directory; name a script in it, or a module with -m"),
    (["-m", "pakage"], "module 'pakage' not found"),
    (["-m", "package.nothing"], "module 'package.nothing' not found"),
    (["-m", "nothing.digits"], "module 'nothing.digits' not found: there is no 'nothing'"),
    (["-m", "package.digits.deeper"], "module 'package.digits.deeper' not found"),
    (["-m", "package.inner"], "'package.inner' is a package without a __main__; name a module in it"),
    (["-m", "package/digits.py"], "-m takes a module's name, not a file: -m package.digits"),
    (["-m", ".digits"], "-m takes a module's name, got '.digits'"),
    (["--no-python", "no-such-program"], "program 'no-such-program' not found"),
    (["-m", "--no-python", "x"], "-m and --no-python exclude each other"),
    (["--host", "a", "train.py"], "unknown option --host; did you mean --hosts?"),
    (["--hosts", "a", "--hostfile", "b", "train.py"], "--hosts and --hostfile exclude each other"),
    (["--hosts", "a,,b", "train.py"], "--hosts 'a,,b' has an empty entry"),
    (["--hosts", "a:0", "train.py"], "slots must be a number from 1 to 65536, got '0' (in --hosts a:0)"),
    (["--hosts", "a:2,b", "--nproc", "auto", "train.py"],
     "--nproc auto counts what this machine has: with hosts, give a number, or each its slots"),
    (["--hosts", "a", "--ssh-port", "0", "train.py"], "--ssh-port must be a port from 1 to 65535, got '0'"),
    (["--hosts", "a", "--ssh-command", " ", "train.py"], "--ssh-command is empty"),
    (["--hosts", "a", "--ssh-command", "ssh 'x", "train.py"], '--ssh-command "ssh \'x": No closing quotation'),
    (["--hosts", "a", "trian.py"], "script 'trian.py' does not exist; did you mean train.py?"),
    (["--hostfile", "none", "train.py"], "cannot read the hostfile none: No such file or directory"),
    (["--workdir", "there", "train.py"], "--workdir needs --hosts or --hostfile"),
    (["--remote-python", "p", "train.py"], "--remote-python needs --hosts or --hostfile"),
    (["--env", "NO SUCH", "train.py"], "--env takes NAME or NAME=VALUE, got 'NO SUCH'"),
    (["--env", "NO_SUCH_VARIABLE", "train.py"],
     "--env NO_SUCH_VARIABLE: it is not set here; give it a value, or leave it out"),
    (["--config", "none.yaml", "train.py"], "cannot read the config file none.yaml: No such file or directory"),
    (["--override", "training.epoch=1", "train.py"],
     "unknown key 'training.epoch' in --override training.epoch=1; did you mean training.epochs?"),
    (["--override", "training.batch_size=many", "train.py"],
     "training.batch_size must be an integer >= 1, got 'many' (from --override training.batch_size=many)"),
])
def test_wrong_command_lines_get_one_line_and_exit_code_2(job, argv, message, capsys):
    assert command.main(argv) == 2
    assert capsys.readouterr() == ("", f"pyfleet-launch: error: {message}\n")


def test_help_names_every_option_once(job, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--nproc N", "--module", "--config FILE", "--override KEY=VALUE", "--log-dir DIR", "--no-prefix",
                   "--timeout-grace S", "--master-port PORT", "--standalone", "--no-python", "--hosts HOSTS", "--hostfile FILE",
                   "--workdir DIR", "--remote-python PATH", "--ssh-command COMMAND", "--ssh-port PORT", "--env NAME[=VALUE]",
                   "--tmux"):
        assert option in text
    assert "_per_node" not in text
    assert "--panes" not in text


def run(*argv, cwd=None):
    return subprocess.run([sys.executable, *argv], cwd=cwd or ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_program_that_can_not_be_started_is_one_line_too(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    ended = run("-m", "pyfleet", "launch", "--no-python", str(program))
    assert ended.returncode == 1
    assert ended.stderr.startswith("pyfleet launch: cannot start the ranks: ")
    assert ended.stderr.count("\n") == 1


def test_so_is_an_ssh_that_is_not_there(tmp_path):
    (tmp_path / "ok.py").touch()
    ended = run("-m", "pyfleet", "launch", "--hosts", "192.0.2.1", "--ssh-command", "no-such-ssh -v", str(tmp_path / "ok.py"))
    assert (ended.returncode, ended.stderr) == (
        1, "pyfleet launch: cannot start the ranks: [Errno 2] No such file or directory: 'no-such-ssh'\n")


def test_the_package_on_the_command_line(tmp_path):
    (tmp_path / "ok.py").write_text("print('ran')")
    ended = run("-m", "pyfleet", "launch", str(tmp_path / "ok.py"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[rank 0] ran\n", "")
    ended = run("-m", "pyfleet", "lunch")
    assert (ended.returncode, ended.stderr) == (2, "pyfleet: error: unknown command lunch; did you mean launch?\n")
    assert run("-m", "pyfleet").returncode == 2
    assert run("-m", "pyfleet", "--version").stdout.startswith("pyfleet ")
    assert all(verb in run("-m", "pyfleet", "--help").stdout for verb in COMMANDS)


def test_every_verb_of_the_table_is_there():
    for verb, target in COMMANDS.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), verb


def test_main_without_a_verb_we_know(capsys):
    assert main(["zzz"]) == 2
    assert capsys.readouterr().err == f"pyfleet: error: unknown command zzz; there is {', '.join(COMMANDS)}\n"


def test_the_launcher_starts_fast_because_it_imports_little():
    ended = run("-c", "import sys, pyfleet.commands.launch; "
                "print([m for m in ('torch', 'numpy', 'yaml', 'rich', 'psutil', 'asyncio') if m in sys.modules])")
    assert ended.stdout == "[]\n", ended.stderr
