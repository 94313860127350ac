"""One module per kind of engine, imported only inside a worker."""

from edge_agent.backends.base import Backend
from edge_agent.errors import LoadFailed


def create_backend(name: str) -> Backend:
    """A backend that has loaded nothing yet.

    Raises:
        LoadFailed: no such backend.
    """
    if name == "llama_cpp":
        from edge_agent.backends.llama_cpp import LlamaCpp

        return LlamaCpp()
    raise LoadFailed(f"no backend {name!r}", metadata={"backend": name})
