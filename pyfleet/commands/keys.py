"""Show or make this node's identity, and make secrets for a namespace."""
from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import ClusterConfig, load_config
from pyfleet.errors import ConfigError
from pyfleet.identity.keys import FILE_NAME, NodeKey, home_folder, short_id
from pyfleet.identity.namespace import Namespace, new_psk

ACTIONS = {
    "show": "print who this node is, and the tag of its namespace where a PSK is set",
    "new": "make a key; --replace puts the old one aside and makes this a new node",
    "psk": "make a pre-shared key that nobody can guess: print it, or write it to --output",
}


def main(argv: list[str] | None = None, prog: str = "pyfleet keys") -> int:
    """The `pyfleet keys` command."""
    told = "".join(f"\n  {action:6} {what}" for action, what in ACTIONS.items())
    parser = Parser(prog=prog, description=__doc__, usage=f"{prog} (show | new | psk) [options]\n{told}")
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--replace", action="store_true", help="new: keep the old key under another name")
    parser.add_argument("--output", metavar="FILE", help="psk: write it here, for this user only; never overwrites")
    try:
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
        for name, action in (("replace", "new"), ("output", "psk")):
            if getattr(options, name) and options.action != action:
                raise Refused(f"--{name} goes with {action}")
        cluster = load_config()[1]
        facts = {"show": _show, "new": _new, "psk": _psk}[options.action](cluster, options)
    except Refused as error:
        return refuse(prog, error)
    except (ConfigError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts, indent=2))
    elif list(facts) == ["psk"]:
        print(facts["psk"])                     # alone, to be piped
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")
    return 0


def _show(cluster: ClusterConfig, options: object) -> dict[str, str]:
    folder = home_folder(cluster.home)
    try:
        key = NodeKey.load(folder)
    except FileNotFoundError:
        raise ConfigError(f"there is no node key in {folder} yet; `pyfleet keys new` makes one, and so does the first "
                          f"meeting with another host") from None
    facts = _facts(key, folder)
    namespace = Namespace.configured(cluster)
    if namespace is not None:
        facts |= {"namespace": namespace.name, "tag": namespace.tag}
    return facts


def _new(cluster: ClusterConfig, options: object) -> dict[str, str]:
    folder = home_folder(cluster.home)
    path, put_aside = folder / FILE_NAME, {}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if options.replace and path.exists():
        aside = folder / f"{FILE_NAME}.{secrets.token_hex(4)}.old"
        os.rename(path, aside)
        put_aside = {"put aside": str(aside)}
    try:
        NodeKey.generate().store(folder)
    except FileExistsError:
        raise ConfigError(f"{path} exists; --replace puts it aside and makes this a new node") from None
    return _facts(NodeKey.load(folder), folder) | put_aside


def _facts(key: NodeKey, folder: Path) -> dict[str, str]:
    return {"node": short_id(key.peer_id), "peer id": key.peer_id, "public key": key.public.hex(),
            "file": str(folder / FILE_NAME)}


def _psk(cluster: ClusterConfig, options: object) -> dict[str, str]:
    psk = new_psk()
    if options.output is None:
        return {"psk": psk}
    Path(options.output).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(psk + "\n")
    return {"file": options.output}
