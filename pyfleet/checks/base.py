"""P5: the contract of a check: a function that looks at one thing, and says what it saw and what to do about it."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyfleet.config import ClusterConfig
from pyfleet.members import Node, Sighting

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"
STATUSES = (OK, WARN, FAIL, SKIPPED)    # warn: it works, but not as well as it could; fail: something will not work


@dataclass(frozen=True)
class Finding:
    """What a check saw.

    Attributes:
        name:   of the thing: the check's, with more behind a space where it looks at several.
        status: one of STATUSES.
        advice: what to do; empty when all is well.
    """

    name: str
    status: str
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine under these settings, and what others have said where somebody has asked them.

    Attributes:
        num_ranks: that are to run here; None where it is not known.
        peers:     addresses of other machines that somebody named, host or host:port.
        sightings: of nodes in this namespace; None where nobody has looked for them. `nodes` and `skews_s` likewise.
        skews_s:   {peer id: by how many seconds its clock is ahead of this one}.
    """

    cluster: ClusterConfig
    num_ranks: int | None = None
    peers: Sequence[str] = ()
    sightings: Sequence[Sighting] | None = None
    nodes: Sequence[Node] | None = None
    skews_s: Mapping[str, float] | None = None


Check = Callable[[Subject], Iterator[Finding]]
