"""Benchmarks: `python -m bench NAME` prints a table; `pytest bench --benchmark-only` runs the throughput suite.

A benchmark is a module here with `main(argv) -> exit status` and a row in `BENCHMARKS`; its first docstring line is what
`python -m bench` lists. Every system that a benchmark compares, ours or a rival's, is an adapter of the contract in
bench/systems.py and lives in the same processes, in the same run, on the same network as the others.
"""

BENCHMARKS = {
    "allreduce": "bench.allreduce",
    "collectives": "bench.collectives",
    "compress": "bench.compress",
    "links": "bench.links",
    "sparsify": "bench.sparsify",
    "tradeoff": "bench.tradeoff",
    "waiting": "bench.waiting",
}
