"""P0: the exceptions and enumerations of the core, under the names users import."""
from fleetcore.errors import (
    AuthFailed,
    CommunicationError,
    ConfigError,
    CorruptData,
    DType,
    DTypeError,
    Evicted,
    FleetError,
    NotEnoughPeers,
    NotInitialized,
    OutOfStep,
    PeerLost,
    ReduceOp,
    ShapeError,
    Timeout,
)

__all__ = [
    "AuthFailed", "CommunicationError", "ConfigError", "CorruptData", "DType", "DTypeError", "Evicted", "FleetError",
    "NotEnoughPeers", "NotInitialized", "OutOfStep", "PeerLost", "ReduceOp", "ShapeError", "Timeout",
]
