"""What the configuration says about the ledger."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """Bounds of the file, and how long ended runs stay in it.

    `max_bytes` caps the file without its write-ahead log. `ballast_bytes` are kept on the disk to
    be given up when it is full; 0 keeps none. `session_retention_s` counts from a session's last
    use.
    """

    max_bytes: int
    retention_s: float
    ballast_bytes: int
    session_retention_s: float = 604_800.0
