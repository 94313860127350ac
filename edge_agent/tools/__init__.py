"""The tools that the daemon executes itself: its built-ins, and those of MCP servers."""
