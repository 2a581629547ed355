"""P1: who a node is, who belongs together, and how two of them make sure of both."""
from pyfleet.identity.handshake import Initiator, Purpose, Responder, Session
from pyfleet.identity.keys import NodeKey, peer_id, short_id
from pyfleet.identity.namespace import Namespace
from pyfleet.identity.throttle import Throttle

__all__ = ["Initiator", "Namespace", "NodeKey", "Purpose", "Responder", "Session", "Throttle", "peer_id", "short_id"]
