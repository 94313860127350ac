"""edge-agent: a daemon that runs AI agents on small language models on the device."""

__version__ = "0.1.0"
