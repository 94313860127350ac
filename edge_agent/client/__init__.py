"""Clients for robots and apps: `Client` for threads, `AsyncClient` for asyncio.

They speak `core` values and raise `errors`; nothing of gRPC shows. They own the connection and, in
`run`, the order in which tool calls are executed: one after the other, as they were issued. They
decide nothing about runs and never repeat a call by themselves.

    from edge_agent.client import Client

    with Client(name="my-robot") as client:
        print(client.run("What is the capital of France?").answer)
"""

from edge_agent.api.convert_client import RunOptions
from edge_agent.client.asynchronous import AsyncClient
from edge_agent.client.blocking import Client
from edge_agent.client.toolbox import Tools
from edge_agent.client.wire import Goal, default_address

__all__ = ["AsyncClient", "Client", "Goal", "RunOptions", "Tools", "default_address"]
