"""Run a script as several ranks, on this machine or on several."""
from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import (
    CONFIG_VARIABLE,
    ClusterConfig,
    ambient_overrides,
    environment,
    host_and_port,
    load_config,
    read_file,
)
from pyfleet.errors import ConfigError, FleetError
from pyfleet.hosts import Host, parse_hosts, read_hostfile
from pyfleet.launchers.base import GRACE_S, Job, Launcher
from pyfleet.launchers.join import JoinLauncher
from pyfleet.launchers.local import LocalLauncher
from pyfleet.launchers.ssh import Reach, SshLauncher
from pyfleet.launchers.tmux import InTmux, TmuxLauncher
from pyfleet.placement import num_cores

EPILOG = """everything after the script belongs to it. The exit code is that of the first rank to fail, 128 + n for signal n,
2 when the command line makes no sense. With --hosts, ssh must let you in without a password; PYFLEET_* variables and those
of --env go along, and a secret is made for the run where none is set."""
# Said anew for every rank, or of use on this machine alone.
KEPT_HERE = {"PYFLEET_CONFIG", "PYFLEET_OVERRIDES", "PYFLEET_PSK", "PYFLEET_PSK_FILE", "PYFLEET_RENDEZVOUS", "PYFLEET_RANK",
             "PYFLEET_WORLD_SIZE", "PYFLEET_LOCAL_RANK", "PYFLEET_LOCAL_WORLD_SIZE", "PYFLEET_NODE_RANK",
             "PYFLEET_MASTER_ADDR", "PYFLEET_MASTER_PORT"}


def main(argv: list[str] | None = None, prog: str = "pyfleet-launch") -> int:
    """The `pyfleet-launch` command: run the ranks and return the exit code."""
    try:
        job, launcher = _job(sys.argv[1:] if argv is None else argv, prog)
        return launcher.run(job)
    except (Refused, ConfigError) as error:
        return refuse(prog, error)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{prog}: cannot start the ranks: {error}", file=sys.stderr)
        return 1
    except FleetError as error:     # nobody to join, for example
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:       # before the launcher listens
        return 130


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG,
                    usage=f"{prog} [options] (script.py | -m module | --no-python program) [args ...]")
    add = parser.add_argument
    add("--nproc", "--nproc-per-node", "-n", metavar="N", default="1", help="ranks to start; auto: one per accelerator, "
        "or per core where there is none (default: 1)")
    add("-m", "--module", action="store_true", help="run a module, as python -m does")
    add("--no-python", action="store_true", help="run a program that is not Python")
    add("--config", metavar="FILE", help="YAML or JSON with the sections training and cluster")
    add("--override", metavar="KEY=VALUE", action="append", default=[], help="a setting that wins over every other "
        "source, such as training.batch_size=64; may be repeated")
    add("--log-dir", metavar="DIR", help="write what each rank prints to DIR/rank_<n>.log as well")
    add("--no-prefix", action="store_true", help="show lines without [rank n] before them")
    add("--timeout-grace", metavar="S", default=str(GRACE_S), help="seconds between asking ranks to end and killing "
        f"them (default: {GRACE_S:g})")
    add("--master-port", metavar="PORT", help="the ranks' MASTER_PORT (default: a free one)")
    add("--standalone", action="store_true", help="accepted for torchrun's sake: ranks on one machine always are")
    add("--join", action="store_true", help="join the machines on which the same command is given: they find each other on the "
        "network, by the secret that they share (see pyfleet keys)")
    add("--min-nodes", metavar="N", help="with --join: machines to wait for, this one included (default: cluster.min_peers + 1)")
    add("--peer", metavar="HOST[:PORT]", action="append", default=[], help="with --join: a machine to ask, where the network "
        "lets no multicast through; may be repeated")
    add("--namespace", metavar="NAME", help="with whom: cluster.namespace")
    add("--psk-file", metavar="FILE", help="the file that holds the secret: cluster.psk_file")
    add("--role", choices=("auto", "master", "worker"), help="with --join: the master is found at --port by workers that are "
        "given its address as --master; auto needs neither")
    add("--master", metavar="ADDRESS", help="with --role worker: host[:port] of the master")
    add("--port", metavar="PORT", help="with --role master: where it listens for workers (default: 50051)")
    add("--env", "-x", metavar="NAME[=VALUE]", action="append", default=[], help="a variable for every rank, from here "
        "unless a value is given; may be repeated")
    add("--hosts", metavar="HOSTS", help="machines to start ranks on, over ssh: [user@]host[:slots],...; --nproc is the "
        "slots of those that do not say")
    add("--hostfile", metavar="FILE", help="the same, one machine a line: host slots=4, or host:4")
    add("--workdir", metavar="DIR", help="where to start on the hosts (default: the folder of this name, or the same below "
        "the home folder)")
    add("--remote-python", metavar="PATH", help="Python on the hosts (default: the one at this one's path, or python3)")
    add("--ssh-command", metavar="COMMAND", help="in place of ssh, with options: 'ssh -i key -J gateway'")
    add("--ssh-port", metavar="PORT", help="where sshd listens on the hosts")
    add("--tmux", action="store_true", help="run in a tmux session with a pane for each rank, which goes on when its terminal "
        "is detached")
    add("--panes", help=argparse.SUPPRESS)      # what --tmux says to the launcher in the session
    return parser


def _job(argv: list[str], prog: str) -> tuple[Job, Launcher]:
    """The job that the command line describes, and who is to run it.

    Raises:  Refused or ConfigError when it describes none.
    """
    parser = _parser(prog)
    mine, script = parser.split(argv)
    options = parser.parse_args(mine)
    num_ranks = _num_ranks(options.nproc)
    grace_s = _number(options.timeout_grace, "--timeout-grace", "a number of seconds >= 0", float, 0, 1e9)
    port = options.master_port and _number(options.master_port, "--master-port", "a port from 1 to 65535", int, 1, 65535)
    if not script:
        raise Refused("nothing to run: name a script, or a module after -m")
    hosts = _hosts(options)
    command = _command(script, options.module, options.no_python, check=options.workdir is None)
    overrides = [*options.override, *_membership(options)]
    cluster = load_config(options.config, overrides)[1]
    job = Job(command, num_ranks, grace_s, port, options.log_dir, not options.no_prefix, options.config,
              (*ambient_overrides(), *overrides), panes=options.panes, environment=_chosen_variables(options.env))
    joins = bool(options.join or options.role)
    if joins:
        if hosts:
            raise Refused("--join finds the machines by itself: leave out --hosts and --hostfile, or --join")
        min_nodes = options.min_nodes and _number(options.min_nodes, "--min-nodes", "a number >= 1", int, 1, 1 << 16)
        launcher = JoinLauncher(LocalLauncher(), min_nodes or cluster.min_peers + 1, cluster.peer_timeout)
    elif hosts:
        launcher = SshLauncher(hosts, _reach(options, cluster, dict(job.environment), len(hosts)))
        job = _without_secrets(job)
    else:
        launcher = LocalLauncher()
    if options.tmux:
        rest = [*(word for word in mine if word != "--tmux"), "--", *script]
        return job, TmuxLauncher([sys.executable, "-m", "pyfleet", "launch", "--panes"], rest, _titles(job, hosts, joins))
    return job, launcher if job.panes is None else InTmux(launcher)


def _titles(job: Job, hosts: list[Host], joins: bool) -> list[str]:
    """What the pane of each rank is called; ranks that join others learn their numbers later."""
    places = ([host.name for host in hosts for _ in range(host.slots or job.num_ranks)] if hosts else
              [socket.gethostname()] * job.num_ranks)
    return [f"{'local ' if joins else ''}rank {rank} on {place}" for rank, place in enumerate(places)]


def _membership(options: object) -> list[str]:
    """What the command line says of whom to join, as settings."""
    for name in ("min_nodes", "peer"):
        if getattr(options, name) and not (options.join or options.role):
            raise Refused(f"--{name.replace('_', '-')} needs --join")
    if options.master and options.role != "worker":
        raise Refused("--master needs --role worker")
    if options.port and options.role != "master":
        raise Refused("--port needs --role master; workers say --master HOST:PORT")
    if options.role == "worker" and not options.master:
        raise Refused("--role worker needs --master HOST[:PORT]; without an address, say --join")
    said = [f"cluster.{name}={value}" for name, value in (("namespace", options.namespace), ("psk_file", options.psk_file),
            ("role", options.role), ("static_peers", ",".join(options.peer))) if value]
    if options.port:
        said.append(f"cluster.master_port={_number(options.port, '--port', 'a port from 1 to 65535', int, 1, 65535)}")
    if options.master:
        try:
            host, port = host_and_port(options.master, 0)
        except ValueError:
            raise Refused(f"--master must be HOST or HOST:PORT, got {options.master!r}") from None
        said += [f"cluster.master_addr={host}"] + [f"cluster.master_port={port}"] * bool(port)
    return said


def _hosts(options: object) -> list[Host]:
    """The machines that the command line names; none means here."""
    if options.hosts is not None and options.hostfile is not None:
        raise Refused("--hosts and --hostfile exclude each other")
    if options.hosts is None and options.hostfile is None:
        for name in ("workdir", "remote_python", "ssh_command", "ssh_port"):
            if getattr(options, name) is not None:
                raise Refused(f"--{name.replace('_', '-')} needs --hosts or --hostfile")
        return []
    hosts = parse_hosts(options.hosts) if options.hosts is not None else read_hostfile(options.hostfile)
    if not options.nproc.isdigit() and not all(host.slots for host in hosts):
        raise Refused(f"--nproc {options.nproc} counts what this machine has: with hosts, give a number, or each its slots")
    return hosts


def _reach(options: object, cluster: ClusterConfig, chosen: dict[str, str], num_hosts: int) -> Reach:
    """How to get to the machines, and what goes along."""
    port = options.ssh_port and _number(options.ssh_port, "--ssh-port", "a port from 1 to 65535", int, 1, 65535)
    try:
        ssh = shlex.split(options.ssh_command or "ssh")
    except ValueError as error:
        raise Refused(f"--ssh-command {options.ssh_command!r}: {error}") from None
    if not ssh:
        raise Refused("--ssh-command is empty")
    known = {name: value for name, value in environment().items() if name.startswith("PYFLEET_") and name not in KEPT_HERE}
    if secret := _secret(cluster, num_hosts):
        known["PYFLEET_PSK"] = secret
    return Reach(ssh, port, options.remote_python, options.workdir, known | chosen, cluster.connection_timeout_ms / 1000,
                 cluster.peer_timeout)


def _secret(cluster: ClusterConfig, num_hosts: int) -> str | None:
    """The PSK of the run: what the settings say, else a new one where ranks have to find each other over a network."""
    from pyfleet.identity import Namespace
    from pyfleet.identity.namespace import new_psk, read_psk
    if cluster.psk is not None and cluster.psk_file is not None:
        Namespace.configured(cluster)           # says what is wrong with that
    if cluster.psk_file is not None:
        return read_psk(Path(cluster.psk_file))
    return cluster.psk or (new_psk() if num_hosts > 1 else None)


def _without_secrets(job: Job) -> Job:
    """The job as other machines may have it: the config file's content for its path, and no PSK, which goes by itself."""
    path = job.config_path or environment().get(CONFIG_VARIABLE)
    sections = read_file(path) if path else {}
    for name in ("psk", "psk_file"):
        sections.get("cluster", {}).pop(name, None)
    overrides = [entry for entry in job.overrides
                 if entry.partition("=")[0].strip().rpartition(".")[2] not in ("psk", "psk_file")]
    return replace(job, config_path=None, config=json.dumps(sections, default=str) if path else None,
                   overrides=tuple(overrides), environment=())


def _chosen_variables(entries: list[str]) -> tuple[tuple[str, str], ...]:
    """The variables of --env."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise Refused(f"--env takes NAME or NAME=VALUE, got {entry!r}")
        if not equals and name not in environment():
            raise Refused(f"--env {name}: it is not set here; give it a value, or leave it out")
        found[name] = value if equals else environment()[name]
    return tuple(found.items())


def _number(text: str, option: str, expected: str, kind: type, low: float, high: float) -> int | float:
    try:
        value = kind(text)
        if not low <= value <= high:    # nor is a NaN
            raise ValueError
    except ValueError:
        raise Refused(f"{option} must be {expected}, got {text!r}") from None
    return value


def _num_ranks(text: str) -> int:
    if text in ("auto", "cpu", "gpu"):
        accelerators = 0 if text == "cpu" else _num_accelerators()
        if text == "gpu" and not accelerators:
            raise Refused("--nproc gpu: this machine has no accelerator that several ranks can share out")
        return accelerators or num_cores()
    return _number(text, "--nproc", "a number >= 1, or auto", int, 1, 1 << 16)


def _num_accelerators() -> int:
    """NVIDIA devices that ranks may use, found without the seconds that importing torch takes."""
    visible = environment().get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def _command(script: list[str], is_module: bool, no_python: bool, *, check: bool = True) -> tuple[str, ...]:
    """The argv of a rank; check: Refused when what it names is not there."""
    name, *args = script
    if is_module and no_python:
        raise Refused("-m and --no-python exclude each other")
    if no_python:
        if check and shutil.which(name) is None:
            raise Refused(f"program {name!r} not found")
        return (name, *args)
    if is_module:
        if check:
            _check_module(name)
        return (sys.executable, "-m", name, *args)
    if not check:
        return (sys.executable, name, *args)
    path = Path(name)
    if path.is_dir():
        raise Refused(f"{name!r} is a directory; name a script in it, or a module with -m")
    if not path.exists():
        raise Refused(f"script {name!r} does not exist{_near_file(path)}")
    if not os.access(path, os.R_OK):
        raise Refused(f"script {name!r} can not be read")
    return (sys.executable, name, *args)


def _near_file(path: Path) -> str:
    """The file of that folder whose name is closest, as a hint."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return f"; nor does the folder {str(path.parent)!r}"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _check_module(name: str) -> None:
    """Refused when python -m would not find the module; imports nothing unless finding it takes that."""
    if name.endswith(".py"):
        raise Refused(f"-m takes a module's name, not a file: -m {name.removesuffix('.py').replace(os.sep, '.')}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise Refused(f"-m takes a module's name, got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)        # as python -m does
    spec, path = None, None
    for depth, part in enumerate(name.split(".")):
        full = ".".join(name.split(".")[:depth + 1])
        spec = _find(full) if depth == 0 else PathFinder.find_spec(full, path) or _find(full)
        if spec is None:
            raise Refused(f"module {name!r} not found" + ("" if full == name else f": there is no {part!r}"))
        path = spec.submodule_search_locations or []
    if spec.submodule_search_locations is not None and PathFinder.find_spec(f"{name}.__main__", path) is None:
        raise Refused(f"{name!r} is a package without a __main__; name a module in it")


def _find(name: str) -> object | None:
    try:
        return importlib.util.find_spec(name)
    except Exception:   # noqa: BLE001 a parent package may raise anything when it is imported, and then has no such module
        return None
