"""How long to wait before what has failed is tried again. Pure."""

from typing import Final

LONGEST_PAUSE_S: Final = 60.0
_MOST_DOUBLINGS: Final = 30


def pause_s(failures: int, first_pause_s: float) -> float:
    """After so many failures in a row (at least 1): twice as long each time, up to the longest."""
    doublings = min(failures - 1, _MOST_DOUBLINGS)
    return min(first_pause_s * 2.0**doublings, LONGEST_PAUSE_S)
