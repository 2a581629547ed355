"""C2, open set: bytes to one peer. `base` is the contract."""

TRANSPORTS = {
    "tcp": "fleetcore.transports.tcp:TcpLink",
    "loopback": "fleetcore.transports.loopback:LoopbackLink",
}
