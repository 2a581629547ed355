"""C2, open set: bytes to one peer. `base` is the contract."""

TRANSPORTS = {
    "tcp": "fleetcore.transports.tcp:TcpLink",
    "secure": "fleetcore.transports.secure:SecureLink",
    "striped": "fleetcore.transports.striped:StripedLink",
    "loopback": "fleetcore.transports.loopback:LoopbackLink",
}
