"""P5: whether this node's key can be used, and whether anybody else has the same."""
from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator

from pyfleet.checks.base import FAIL, OK, SKIPPED, Finding, Subject
from pyfleet.errors import ConfigError
from pyfleet.identity.keys import FILE_NAME, NodeKey, home_folder, short_id
from pyfleet.members import Sighting


def check(subject: Subject) -> Iterator[Finding]:
    """The key's file, then what discovery has seen."""
    yield _key_file(subject)
    if subject.sightings is None:
        yield Finding("identity of others", SKIPPED, "nobody has looked for other nodes")
        return
    twins = duplicates(subject.sightings)
    for peer, seen in twins.items():
        where = "; ".join(f"{each.name or 'a node'} at {', '.join(each.addresses)}" for each in seen)
        yield Finding("identity of others", FAIL, f"{len(seen)} nodes are {short_id(peer)} at once: {where}",
                      f"a home folder or a disk was copied: `pyfleet keys new --replace` on all of them but one, and delete "
                      f"{FILE_NAME} from the image")
    if not twins:
        num = len({each.peer for each in subject.sightings if each.peer})
        yield Finding("identity of others", OK, f"{num} node{'s' * (num != 1)} seen, no identity twice")


def duplicates(sightings: Iterable[Sighting]) -> dict[str, list[Sighting]]:
    """{peer id: one sighting of each incarnation} of identities that several living processes claim."""
    seen: dict[str, dict[str, Sighting]] = defaultdict(dict)
    for each in sightings:
        if each.peer and each.incarnation:
            seen[each.peer].setdefault(each.incarnation, each)
    return {peer: list(found.values()) for peer, found in seen.items() if len(found) > 1}


def _key_file(subject):
    try:
        folder = home_folder(subject.cluster.home)
        key = NodeKey.load(folder)
    except FileNotFoundError:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding("identity", OK, f"no key in {folder} yet: it is made on first use")
        return Finding("identity", FAIL, f"there is no key in {folder}, and none can be made there",
                       "make the folder writable, or set PYFLEET_HOME to one that is")
    except ConfigError as error:
        return Finding("identity", FAIL, str(error), "as it says; `pyfleet keys new --replace` makes this a new node")
    return Finding("identity", OK, f"this node is {short_id(key.peer_id)} ({folder / FILE_NAME})")
