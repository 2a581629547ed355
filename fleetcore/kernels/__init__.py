"""C1, open set: per-element loops, one file per kind. Nothing here knows ranks or links."""

KERNELS = {
    "reduce": "fleetcore.kernels.reduce",
    "cast": "fleetcore.kernels.cast",
    "quantize": "fleetcore.kernels.quantize",
    "copy": "fleetcore.kernels.copy",
    "checksum": "fleetcore.kernels.checksum",
    "sparsify": "fleetcore.kernels.sparsify",
    "indices": "fleetcore.kernels.indices",
}
