"""C0: the exception tree and the enumerations shared by every floor."""
from enum import IntEnum


class FleetError(Exception):
    """Base of everything pyfleet raises on purpose."""


class CommunicationError(FleetError):
    """An operation between ranks failed; the group is dead, the process and its inputs are not.

    Attributes:
        rank:       the rank held responsible, or None when no single one is.
        operation:  what this rank had called, e.g. "all_reduce(float32[1024], sum)"; None outside operations.
        epoch:      the view the group belonged to.
        done_bytes: payload bytes this rank had finished when it failed.
    """

    def __init__(self, message, *, rank=None, operation=None, epoch=None, done_bytes=0):
        super().__init__(message)
        self.rank = rank
        self.operation = operation
        self.epoch = epoch
        self.done_bytes = done_bytes


class PeerLost(CommunicationError):
    """A peer died, left, or its connection broke. `.rank` names it."""


class Timeout(CommunicationError, TimeoutError):
    """A deadline passed. `.rank` names the peer that was waited for, where there is one."""


class OutOfStep(CommunicationError):
    """Ranks called different operations, or the same one with another size, dtype, op or root."""


class CorruptData(CommunicationError):
    """A frame failed its checksum or made no sense; the connection cannot be trusted any more."""


class AuthFailed(FleetError):
    """A peer could not prove that it belongs to the namespace."""


class NotEnoughPeers(FleetError):
    """Fewer peers than required were found before the deadline: "found 1 of 3 ..."."""


class Evicted(FleetError):
    """The others went on without this rank; it has to catch up before it may act again."""


class ConfigError(FleetError, ValueError):
    """A setting is missing, unknown, contradictory or out of range."""


class ShapeError(FleetError, ValueError):
    """An array has the wrong shape, size, layout or memory for what was asked."""


class DTypeError(FleetError, TypeError):
    """An array has a dtype that the operation does not offer."""


class NotInitialized(FleetError, RuntimeError):
    """There is no current fleet: call pyfleet.init() first (or it was shut down)."""


class ReduceOp(IntEnum):
    """How values of several ranks become one. Strings are accepted wherever an op is ("sum", "mean", ...)."""

    SUM = 0
    MEAN = 1
    MIN = 2
    MAX = 3
    PRODUCT = 4
    AVG = 1
    AVERAGE = 1
    PROD = 4


class DType(IntEnum):
    """Element types, numbered as in status.pxd and on the wire."""

    FLOAT32 = 0
    FLOAT64 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    UINT8 = 8
    BOOL = 9


class Verb(IntEnum):
    """Collective operations, numbered as in status.pxd and on the wire."""

    BARRIER = 0
    ALL_REDUCE = 1
    BROADCAST = 2
    REDUCE_SCATTER = 3
    ALL_GATHER = 4
    REDUCE = 5
    GATHER = 6
    SCATTER = 7
    ALL_TO_ALL = 8
