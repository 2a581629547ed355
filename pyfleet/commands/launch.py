"""Run a script as several ranks on this machine."""
from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import ambient_overrides, environment, load_config
from pyfleet.errors import ConfigError
from pyfleet.launchers.base import GRACE_S, Job
from pyfleet.launchers.local import LocalLauncher
from pyfleet.placement import num_cores

EPILOG = """everything after the script belongs to it. The exit code is that of the first rank to fail, 128 + n for signal n,
2 when the command line makes no sense."""


def main(argv: list[str] | None = None, prog: str = "pyfleet-launch") -> int:
    """The `pyfleet-launch` command: run the ranks and return the exit code."""
    try:
        job = _job(sys.argv[1:] if argv is None else argv, prog)
        return LocalLauncher().run(job)
    except (Refused, ConfigError) as error:
        return refuse(prog, error)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{prog}: cannot start the ranks: {error}", file=sys.stderr)
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
    return parser


def _job(argv: list[str], prog: str) -> Job:
    """The job that the command line describes; Refused or ConfigError when it describes none."""
    parser = _parser(prog)
    mine, script = parser.split(argv)
    options = parser.parse_args(mine)
    num_ranks = _num_ranks(options.nproc)
    grace_s = _number(options.timeout_grace, "--timeout-grace", "a number of seconds >= 0", float, 0, 1e9)
    port = options.master_port and _number(options.master_port, "--master-port", "a port from 1 to 65535", int, 1, 65535)
    if not script:
        raise Refused("nothing to run: name a script, or a module after -m")
    command = _command(script, options.module, options.no_python)
    load_config(options.config, options.override)
    return Job(command, num_ranks, grace_s, port, options.log_dir, not options.no_prefix, options.config,
               (*ambient_overrides(), *options.override))


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


def _command(script: list[str], is_module: bool, no_python: bool) -> tuple[str, ...]:
    """The argv of a rank; Refused when what it names is not there."""
    name, *args = script
    if is_module and no_python:
        raise Refused("-m and --no-python exclude each other")
    if no_python:
        if shutil.which(name) is None:
            raise Refused(f"program {name!r} not found")
        return (name, *args)
    if is_module:
        _check_module(name)
        return (sys.executable, "-m", name, *args)
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
