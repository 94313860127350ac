"""An MCP server of ours, with tools that behave and tools that don't; run as a program.

`mcp_server.py NOTES` speaks over standard input and output, `mcp_server.py NOTES PORT` over
streamable HTTP. What happens in it is a line in NOTES, a named pipe, so that tests can wait for it.
"""

import asyncio
import os
import sys
import time
from typing import Any

from mcp import types
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

NOTES = os.open(sys.argv[1], os.O_WRONLY)

server = MCPServer("stock")


def note(*words: object) -> None:
    """One line for the test."""
    os.write(NOTES, f"{' '.join(str(word) for word in words)}\n".encode())


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
    return os.getcwd()  # noqa: PTH109 - as the system says it


@server.tool()
def refuse() -> str:
    """Fail in the tool's own words."""
    raise ToolError("the shelf is empty")


@server.tool()
async def wait_for_ever() -> str:
    """Never answer."""
    note("began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        note("cancelled")
        raise
    return "never"


@server.tool()
async def hang() -> str:
    """Stop the whole server: nothing of it answers any more."""
    note("hangs")
    while True:
        time.sleep(60)  # noqa: ASYNC251 - that is the point


@server.tool()
async def work(for_s: float) -> str:
    """Do nothing else for so long, then answer."""
    time.sleep(for_s)  # noqa: ASYNC251 - that is the point
    return "done"


@server.tool()
def die() -> str:
    """End the server in the middle of the call."""
    os._exit(3)


@server.tool()
def much(size_bytes: int) -> str:
    """Answer with so many bytes."""
    return "x" * size_bytes


@server.tool()
def complain(lines: int) -> str:
    """Write so many lines to standard error."""
    sys.stderr.write("broken!\n" * lines)
    sys.stderr.flush()
    return "said"


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """A picture, a sound and a word."""
    return [
        types.TextContent(type="text", text="look:"),
        types.ImageContent(type="image", data="AAAA", mime_type="image/png"),
        types.AudioContent(type="audio", data="AAAAAAAA", mime_type="audio/wav"),
        types.ResourceLink(type="resource_link", name="map", uri="file:///map"),
        types.EmbeddedResource(
            type="resource",
            resource=types.TextResourceContents(uri="file:///list", text="secret list"),
        ),
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
    """Its input schema is none; see `main`."""
    return "never"


def main() -> None:
    """Serve until the client hangs up."""
    for tool in server._tool_manager.list_tools():
        if tool.name == "misshapen":
            tool.parameters = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    note("pid", os.getpid())
    sys.stderr.write("stock server here\n")
    if len(sys.argv) > 2:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
    else:
        server.run("stdio")


if __name__ == "__main__":
    main()
