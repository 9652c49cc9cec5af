"""``latency_delay.py PORT HOST HOSTPORT MILLISECONDS``: a TCP proxy that hands each byte on so much later, both ways together.

The delay of a line, without a limit to its throughput: what comes while others wait is not held up by them.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Hand on what is read, each block `seconds` after it came, then the end."""
    loop = asyncio.get_running_loop()
    while data := await reader.read(1 << 16):
        loop.call_later(seconds, writer.write, data)
    loop.call_later(seconds, writer.close)


async def _serve(
    host: str, port: int, seconds: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    far_reader, far_writer = await asyncio.open_connection(host, port)
    await asyncio.gather(_pass_on(reader, far_writer, seconds), _pass_on(far_reader, writer, seconds))


async def main() -> None:
    port, host, host_port, milliseconds = sys.argv[1:]
    each_way = float(milliseconds) / 2000
    server = await asyncio.start_server(partial(_serve, host, int(host_port), each_way), "127.0.0.1", int(port))
    await server.serve_forever()


asyncio.run(main())
