"""The agent of a node: its membership as a process of its own, beside the ranks that a launcher starts here.

    python -m pyfleet.membership.agent --socket PATH [--slots N] [--min-nodes N]

Settings come from the environment, as a rank's do; where they name a metrics_port, the agent's metrics are at the port after
those of its ranks. Whoever may open the socket may ask (see pyfleet.contact); it ends, with
a good-bye to the fleet, when its standard input does, or on SIGTERM.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from pyfleet import exporters, metrics
from pyfleet.config import ClusterConfig, load_config
from pyfleet.contact import LARGEST_BYTES, LENGTH, answer_of, pack
from pyfleet.errors import ConfigError, FleetError
from pyfleet.membership.service import Service, open_service

log = logging.getLogger("pyfleet.membership")


async def serve(path: str, service: Service, until: asyncio.Event) -> None:
    """Answer questions at a socket until told to stop.

    Raises:  ConfigError when there can be no socket at the path.
    """
    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            await _converse(reader, writer, service.answer)
        writer.close()

    try:
        server = await asyncio.start_unix_server(welcome, path)
    except OSError as error:
        raise ConfigError(f"no agent can listen at {path}: {error.strerror or error}") from None
    os.chmod(path, 0o600)
    try:
        await until.wait()
    finally:
        server.close()
        with contextlib.suppress(OSError):      # a launcher that was killed left them behind; one that lives may be quicker
            os.unlink(path)
            os.rmdir(os.path.dirname(path))     # if there is nothing else in it


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                    answer: Callable[[dict], Awaitable[Any]]) -> None:
    """One question and its answer; who hangs up before the answer no longer wants it."""
    size, = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if size > LARGEST_BYTES:
        return
    question = msgspec.msgpack.decode(await reader.readexactly(size))
    asked = asyncio.ensure_future(answer(question))
    left = asyncio.ensure_future(reader.read(1))
    await asyncio.wait((asked, left), return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not asked.done():
        asked.cancel()
        return
    error = asked.exception()
    if error is not None and not isinstance(error, (FleetError, KeyError)):
        log.error("the question %r failed", question.get("ask"), exc_info=error)
    writer.write(pack(answer_of(None if error else asked.result(), error)))
    await writer.drain()


async def _run(path: str, cluster: ClusterConfig, slots: int, min_nodes: int) -> None:
    until, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, until.set)

    def hear() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            until.set()
    with contextlib.suppress(PermissionError):          # a file as standard input: nobody to wait for
        loop.add_reader(0, hear)
    wanted = [kind for kind in exporters.wanted(cluster) if kind is exporters.kind_of("metrics_port")]
    service = open_service(cluster, slots=slots, min_nodes=min_nodes)
    await service.open()
    # The ranks of this node have the ports up to metrics_port + slots - 1; files are theirs.
    opened = exporters.open_all(wanted, metrics.REGISTRY, cluster, -1, slots)
    try:
        await serve(path, service, until)
    finally:
        for exporter in opened:
            exporter.close()
        await service.close()


def main(argv: list[str] | None = None) -> int:
    """Run the agent; returns its exit code."""
    parser = argparse.ArgumentParser(prog="pyfleet.membership.agent", description=__doc__.splitlines()[0])
    parser.add_argument("--socket", required=True)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--min-nodes", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        cluster = load_config()[1]
        logging.basicConfig(stream=sys.stderr, format="pyfleet: %(message)s", level=logging.WARNING)
        log.setLevel(min(logging.INFO, getattr(logging, cluster.log_level.upper())))
        asyncio.run(_run(options.socket, cluster, options.slots, options.min_nodes))
    except FleetError as error:
        print(f"pyfleet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
