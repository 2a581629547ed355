"""Imports point down. This table is the architecture: to edit it is to change that."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Floor by floor, lowest first. Within a floor a unit may import only single files that stand before it; folders on one
# floor never import each other.
FLOORS = {
    "C0": ("fleetcore", ["errors", "status", "posix"]),
    "C1": ("fleetcore", ["check", "arena", "kernels/"]),
    "C2": ("fleetcore", ["transports/", "schedules/", "domain"]),
    "C3": ("fleetcore", ["executor", "postroom", "mailbox"]),
    "C4": ("fleetcore", ["group"]),
    "P0": ("pyfleet", ["errors", "config", "hosts", "placement", "members", "metrics", "output", "interfaces",
                       "profile"]),
    "P1": ("pyfleet", ["arrays", "flat", "contact", "devices/", "identity/", "discovery/", "rendezvous/",
                       "compressors/", "exporters/"]),
    "P2": ("pyfleet", ["connections", "wiring", "compression", "choice", "routes", "calls", "staging", "membership/",
                       "gradients/", "data/", "engines/"]),
    "P3": ("pyfleet", ["sampling", "fleet", "autodiscovery", "collectives", "context", "strategies/", "estimators/"]),
    "P4": ("pyfleet", ["checkpoint", "testing", "trainer", "integrations/", "benchmarks/"]),
    "P5": ("pyfleet", ["jobs", "launchers/", "examples/", "checks/"]),
    "P6": ("pyfleet", ["commands/"]),
}
# Folders of kinds: a kind imports only `base` of its own folder, and so does the folder's table.
OPEN_SETS = {"kernels", "transports", "schedules", "devices", "discovery", "rendezvous", "compressors", "exporters",
             "engines", "strategies", "estimators", "integrations", "launchers", "examples", "benchmarks", "checks", "commands"}
TOP = {"pyfleet/__init__.py", "pyfleet/__main__.py"}            # see everything
BARRED_FROM_CORE = {"torch", "numpy", "asyncio", "logging", "threading"}
READS_ENVIRONMENT = {"pyfleet/config.py"}

PLACES = {f"{package}.{unit.rstrip('/')}": (height, index, unit.endswith("/"))
          for height, (package, units) in enumerate(FLOORS.values()) for index, unit in enumerate(units)}

_NAMES = r"(?:\(([^)]*)\)|([^\n#;]*))"
_FROM = re.compile(r"^[ \t]*from[ \t]+(\.*[\w.]*)[ \t]+c?import[ \t]+" + _NAMES, re.MULTILINE)
_PLAIN = re.compile(r"^[ \t]*c?import[ \t]+([^\n#;]+)", re.MULTILINE)


def module_of(path):
    """fleetcore/kernels/__init__.py -> fleetcore.kernels"""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module):
    """fleetcore.kernels.reduce -> fleetcore.kernels"""
    return ".".join(module.split(".")[:2])


def absolute(path, target):
    """The module that `from target import` means in a file; target may begin with dots."""
    dots = len(target) - len(target.lstrip("."))
    if not dots:
        return target
    home = module_of(path).split(".")
    home = home if path.name.startswith("__init__.") else home[:-1]
    return ".".join(part for part in [*home[:len(home) - dots + 1], target.lstrip(".")] if part)


def imports(root, path):
    """(line, module) of each import; a name that is itself a module counts as that module."""
    source = (root / path).read_text()
    found = []
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                target = absolute(path, "." * node.level + (node.module or ""))
                found += [(node.lineno, target, alias.name) for alias in node.names]
    else:
        for match in _FROM.finditer(source):
            names = [name.split()[0] for name in (match[2] or match[3] or "").split(",") if name.split()]
            line = source.count("\n", 0, match.start()) + 1
            found += [(line, absolute(path, match[1]), name) for name in names]
        for match in _PLAIN.finditer(source):
            line = source.count("\n", 0, match.start()) + 1
            found += [(line, name.split()[0], None) for name in match[1].split(",") if name.split()]
    for line, module, name in found:
        folder, inner = root / module.replace(".", "/"), f"{module}.{name}"
        exists = name and (folder / name).is_dir() or any((folder / f"{name}{end}").exists() for end in (".py", ".pyx", ".pxd"))
        yield line, inner if exists or inner in PLACES else module


def environment_reads(root, path):
    """Lines that touch the process environment."""
    source = (root / path).read_text()
    if path.suffix != ".py":
        return [source.count("\n", 0, match.start()) + 1
                for match in re.finditer(r"\bos\.(environb?|getenvb?|putenv)\b|\b(sec(ure_)?)?getenv\s*\(", source)]
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return [node.lineno for node in ast.walk(ast.parse(source))
            if (isinstance(node, ast.Attribute) and node.attr in names
                and isinstance(node.value, ast.Name) and node.value.id == "os")
            or (isinstance(node, ast.ImportFrom) and node.module == "os"
                and names & {alias.name for alias in node.names})]


def why_not(path, module):
    """Why this file may not import this module of ours, or None."""
    own, target = unit_of(module_of(path)), unit_of(module)
    if path.as_posix() in TOP:
        return None
    if path.as_posix() == "fleetcore/__init__.py":
        return "the package itself imports nothing"
    if own == "pyfleet.examples" and module == "pyfleet":
        return None                     # examples are written as a user's script is
    if module in ("pyfleet", "fleetcore"):
        return "a package's top is not for its own floors"
    if target not in PLACES:
        return "that is on no floor"
    (height, index, _), (target_height, target_index, target_is_folder) = PLACES[own], PLACES[target]
    if own == target:
        is_open = own.split(".")[1] in OPEN_SETS
        allowed = {f"{own}.base", module_of(path)}
        return "a kind knows only base of its own folder" if is_open and module not in allowed else None
    if target_height > height:
        return "that is a floor above"
    if target_height == height and (target_is_folder or target_index > index):
        return "that is a neighbour on the same floor"
    return None


def violations(root):
    """Every breach in a tree, as 'file:line: what'."""
    found = []
    for package in ("fleetcore", "pyfleet"):
        for full in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".pyx", ".pxd")):
            path = full.relative_to(root)
            own = unit_of(module_of(path))
            is_top = path.as_posix() in TOP or path.as_posix() == "fleetcore/__init__.py"
            if not is_top and (own not in PLACES or PLACES[own][2] != (len(path.parts) > 2)):
                found.append(f"{path}:1: is on no floor; give it a place in the table")
                continue
            if package == "pyfleet" and path.suffix != ".py":
                found.append(f"{path}:1: pyfleet is pure Python")
            for line, module in imports(root, path):
                top = module.split(".")[0]
                if package == "fleetcore" and top in BARRED_FROM_CORE:
                    found.append(f"{path}:{line}: fleetcore does not know {top}")
                reason = why_not(path, module) if top in ("fleetcore", "pyfleet") else None
                if reason:
                    found.append(f"{path}:{line}: imports {module}: {reason}")
            if path.as_posix() not in READS_ENVIRONMENT:
                found += [f"{path}:{line}: reads the environment; ask config" for line in environment_reads(root, path)]
    return found


def test_imports_point_down():
    assert "\n".join(violations(ROOT)) == ""


def tree(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


LEGAL = {
    "fleetcore/__init__.py": '"""Core."""\n',
    "fleetcore/errors.py": "from enum import IntEnum\n",
    "fleetcore/posix.pxd": 'cdef extern from "x.h": pass\n',
    "fleetcore/check.pyx": "from fleetcore.errors import A\nfrom fleetcore.posix cimport (\n    close,\n    open,\n)\n",
    "fleetcore/kernels/__init__.py": "",
    "fleetcore/kernels/reduce.pxd": "",
    "fleetcore/kernels/reduce.pyx": "from fleetcore.kernels.reduce cimport x\nfrom fleetcore cimport posix\n",
    "fleetcore/group.pyx": "from fleetcore.kernels cimport reduce, cast as c\ncimport fleetcore.domain\nfrom libc.string cimport y\n",
    "pyfleet/__init__.py": "import pyfleet.commands\nfrom pyfleet.fleet import Fleet\n",
    "pyfleet/config.py": "import os\nos.environ\nfrom pyfleet import errors\n",
    "pyfleet/fleet.py": "def f():\n    from pyfleet.engines import ENGINES\n    from .config import x\n",
    "pyfleet/collectives.py": "from pyfleet.fleet import Fleet\n",
    "pyfleet/engines/__init__.py": "from pyfleet.engines.base import Engine\n",
    "pyfleet/engines/fleet.py": "from .base import Engine\nfrom ..config import x\nimport fleetcore.group\nimport numpy, torch\n",
    "pyfleet/data/sampler.py": "from pyfleet.data.partition import P\n",
    "pyfleet/commands/launch.py": "from pyfleet.launchers.local import L\n",
}


def test_what_is_legal_passes(tmp_path):
    assert violations(tree(tmp_path, LEGAL)) == []


@pytest.mark.parametrize("name,text,told", [
    ("fleetcore/errors.py", "import fleetcore.group", "errors.py:1: imports fleetcore.group: that is a floor above"),
    ("fleetcore/check.pyx", "x = 1\nfrom fleetcore.group cimport Group", "check.pyx:2: imports fleetcore.group: that is a floor"),
    ("fleetcore/check.pyx", "cimport fleetcore.errors, fleetcore.executor", "check.pyx:1: imports fleetcore.executor"),
    ("fleetcore/check.pyx", "from fleetcore cimport (\n  posix,\n  domain as d)", "check.pyx:1: imports fleetcore.domain"),
    ("fleetcore/check.pxd", "from .arena cimport Buffer", "check.pxd:1: imports fleetcore.arena: that is a neighbour"),
    ("fleetcore/transports/tcp.pyx", "from fleetcore.schedules.base import x", "that is a neighbour on the same floor"),
    ("fleetcore/transports/tcp.pyx", "from fleetcore.transports.secure cimport x", "a kind knows only base"),
    ("fleetcore/transports/tcp.pyx", "from fleetcore.transports import TABLE", "a kind knows only base"),
    ("fleetcore/transports/__init__.py", "from fleetcore.transports.tcp import x", "a kind knows only base"),
    ("fleetcore/group.pyx", "def f():\n    import numpy as np", "group.pyx:2: fleetcore does not know numpy"),
    ("fleetcore/group.pyx", "from logging import getLogger", "fleetcore does not know logging"),
    ("fleetcore/group.pyx", "import os\nx = os.environ['A']", "group.pyx:2: reads the environment"),
    ("fleetcore/group.pyx", "from pyfleet.config import x", "imports pyfleet.config: that is a floor above"),
    ("fleetcore/__init__.py", "from fleetcore.errors import x", "the package itself imports nothing"),
    ("fleetcore/utils.pyx", "", "utils.pyx:1: is on no floor"),
    ("pyfleet/errors.py", "from pyfleet.config import x", "that is a neighbour on the same floor"),
    ("pyfleet/config.py", "from pyfleet.engines.base import x", "that is a floor above"),
    ("pyfleet/fleet.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pyfleet.trainer import T", "fleet.py:3: "),
    ("pyfleet/fleet.py", "def f():\n    import pyfleet.commands.launch", "fleet.py:2: imports pyfleet.commands.launch"),
    ("pyfleet/fleet.py", "import pyfleet", "a package's top is not for its own floors"),
    ("pyfleet/fleet.py", "from os import getenv", "fleet.py:1: reads the environment"),
    ("pyfleet/fleet.py", "import os\ndef f(): return os.getenv('A')", "fleet.py:2: reads the environment"),
    ("pyfleet/fleet.pyx", "", "pyfleet is pure Python"),
    ("pyfleet/gradients/hooks.py", "from ..data import sampler", "imports pyfleet.data.sampler: that is a neighbour"),
    ("pyfleet/engines/torch.py", "from . import fleet", "imports pyfleet.engines.fleet: a kind knows only base"),
    ("pyfleet/engines/torch.py", "from pyfleet.engines import current", "imports pyfleet.engines: a kind knows only base"),
    ("pyfleet/launchers/local.py", "from pyfleet.commands.base import x", "that is a floor above"),
    ("pyfleet/commands/info.py", "from pyfleet.commands.launch import x", "a kind knows only base"),
    ("pyfleet/trainer/loop.py", "", "is on no floor"),
    ("pyfleet/extra.py", "", "is on no floor"),
])
def test_each_breach_is_found(tmp_path, name, text, told):
    found = violations(tree(tmp_path, LEGAL | {name: text}))
    assert len(found) == 1, found
    assert told in found[0]


def test_every_open_set_is_a_folder_of_the_table():
    folders = {unit.rstrip("/") for _, units in FLOORS.values() for unit in units if unit.endswith("/")}
    assert folders >= OPEN_SETS
