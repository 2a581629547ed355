"""A node that does nothing but discover, for tests: `python -m tests.pyfleet.discovery.peer JSON`, JSON being

    {"kind": "mdns", "psk": ".." or null, "name": "..", "everybody": false, "cluster": {..}, "announce": {..} or null}

It prints one JSON object per event, with "at" on the clock that all processes of this machine share, and obeys lines on its standard
input: "update JSON" announces anew, "state" prints what it knows of itself, "close" says good-bye.
"""
import json
import logging
import resource
import sys
import threading
import time

from pyfleet.config import ClusterConfig
from pyfleet.discovery import Announcement, Seen, open_discovery
from pyfleet.identity.namespace import Namespace

_printing = threading.Lock()


def tell(**facts):
    with _printing:
        print(json.dumps(facts | {"at": time.monotonic()}), flush=True)


def told(event):
    if isinstance(event, Seen):
        sighting = event.sighting
        return {"event": "seen", "peer": sighting.peer, "incarnation": sighting.incarnation, "name": sighting.name,
                "addresses": sighting.addresses, "port": sighting.port, "tag": event.tag, "source": sighting.source}
    return {"event": "gone", "peer": event.peer, "incarnation": event.incarnation}


def announcement(given):
    return Announcement(**{**given, "addresses": tuple(given.get("addresses", ()))}) if given else None


def main():
    class Log(logging.Handler):
        def emit(self, record):
            tell(event="log", text=record.getMessage(), trouble=bool(record.exc_info))
    logging.getLogger("pyfleet").addHandler(Log())
    plan = json.loads(sys.argv[1])
    began = time.monotonic()
    namespace = plan["psk"] and Namespace.from_psk(plan["psk"], plan["name"])
    discovery = open_discovery(plan["kind"], ClusterConfig(**plan["cluster"]), namespace, everybody=plan["everybody"])
    discovery.start(announcement(plan["announce"]), lambda event: tell(**told(event)))
    tell(event="started", seconds=time.monotonic() - began)
    for line in sys.stdin:
        order, _, rest = line.strip().partition(" ")
        if order == "update":
            discovery.update(announcement(json.loads(rest)))
        elif order == "state":
            tell(event="state", strangers=discovery.num_strangers, threads=threading.active_count(),
                 kept=len(getattr(discovery, "_instances", ())), hears_itself=getattr(discovery, "hears_itself", None),
                 resident_kb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        elif order == "close":
            began = time.monotonic()
            discovery.close()
            tell(event="closed", seconds=time.monotonic() - began)


if __name__ == "__main__":
    main()
