"""The one SQLite file that durable runs live in: written before anything is acknowledged."""
