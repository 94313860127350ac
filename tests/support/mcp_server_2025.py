"""An MCP server as most are today, by the specification of 2025-06-18 and without the mcp package.

`mcp_server_2025.py NOTES` over standard input and output. It knows the handshake with `initialize`
alone, answers in its own order, and writes to NOTES, a named pipe, what it is told to stop.
"""

import json
import os
import sys
from typing import Any

NOTES = os.open(sys.argv[1], os.O_WRONLY)
TOOLS: list[dict[str, Any]] = [
    {"name": name, "description": name, "inputSchema": {"type": "object"}}
    for name in ("add", "wait_for_ever", "refuse_call")
]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The result or the error of a request."""
    params = request.get("params", {})
    match request["method"]:
        case "initialize":
            about = {"name": "old stock", "version": "1"}
            said = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
            return {"result": {**said, "serverInfo": about}}
        case "tools/list" if params.get("cursor") == "more":
            return {"result": {"tools": TOOLS[1:]}}
        case "tools/list":
            return {"result": {"tools": TOOLS[:1], "nextCursor": "more"}}
        case "tools/call" if params["name"] == "add":
            total = params["arguments"]["a"] + params["arguments"]["b"]
            return {"result": {"content": [], "structuredContent": {"sum": total}}}
        case "tools/call":
            return {"error": {"code": -32602, "message": "no such shelf"}}
        case method:
            return {"error": {"code": -32601, "message": f"{method}?"}}


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        message = json.loads(line)
        if message["method"] == "notifications/cancelled":
            os.write(NOTES, f"cancelled {message['params']['requestId']}\n".encode())
        elif message.get("params", {}).get("name") == "wait_for_ever":
            os.write(NOTES, f"began {message['id']}\n".encode())
        elif "id" in message:
            reply = {"jsonrpc": "2.0", "id": message["id"], **answer(message)}
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
