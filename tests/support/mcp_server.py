"""An MCP server of ours, with tools that behave and tools that don't; run as a program.

`mcp_server.py DIRECTORY` speaks over standard input and output; `mcp_server.py DIRECTORY PORT` over
streamable HTTP. What happens in it is written to files in DIRECTORY, so that tests can see it.
"""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import mcp.types as types
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

DIRECTORY = Path(sys.argv[1])

server = MCPServer("stock")


def note(name: str, text: str) -> None:
    """One file, whole at once."""
    partial = DIRECTORY / f"{name}.partial"
    partial.write_text(text)
    partial.rename(DIRECTORY / name)


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def environment(name: str) -> str:
    """What an environment variable says."""
    return os.environ.get(name, "(unset)")


@server.tool()
def directory() -> str:
    """Where the server runs."""
    return str(Path.cwd())


@server.tool()
def refuse() -> str:
    """Fail in the tool's own words."""
    raise ToolError("the shelf is empty")


@server.tool()
async def wait_for_ever() -> str:
    """Never answer; says in files when it has begun and when it was cancelled."""
    note("began", "")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        note("cancelled", "")
        raise
    return "never"


@server.tool()
def hang() -> str:
    """Stop the whole server: nothing of it answers any more."""
    note("hangs", str(os.getpid()))
    while True:
        time.sleep(60)


@server.tool()
def die() -> str:
    """End the server in the middle of the call."""
    os._exit(3)


@server.tool()
def much(size_bytes: int) -> str:
    """Answer with so many bytes."""
    return "x" * size_bytes


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """A picture, a sound and a word."""
    return [
        types.TextContent(type="text", text="look:"),
        types.ImageContent(type="image", data="AAAA", mime_type="image/png"),
        types.AudioContent(type="audio", data="AAAAAAAA", mime_type="audio/wav"),
    ]


@server.tool()
async def header(name: str, ctx: Context) -> str:
    """A header of the request."""
    request = ctx.request_context.request
    return "(none)" if request is None else str(request.headers.get(name, "(none)"))


@server.tool()
def vanish() -> str:
    """Take `add` away."""
    server.remove_tool("add")
    return "gone"


@server.tool()
def misshapen() -> str:
    """Its input schema is none."""
    return "never"


def main() -> None:
    """Serve until the client hangs up."""
    for tool in server._tool_manager.list_tools():
        if tool.name == "misshapen":
            tool.parameters = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    note("pid", str(os.getpid()))
    print("stock server here", file=sys.stderr, flush=True)
    if len(sys.argv) > 2:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
    else:
        server.run("stdio")


if __name__ == "__main__":
    main()
