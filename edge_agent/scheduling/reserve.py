"""What the rest of the robot gets when the configuration does not say. Pure.

The system, a ROS graph and one or two cameras, by the size of the module; our own estimate, not
measured on a device. A robot that runs more says so in `scheduling.robot_reserve`.
"""

from typing import Final

from edge_agent.units import GIB, MIB

_BY_MODULE: Final = {
    "p3767-0004": 1536 * MIB,
    "p3767-0003": 2 * GIB,
    "p3767-0005": 2 * GIB,
    "p3767-0001": 2 * GIB,
    "p3767-0000": 4 * GIB,
    "p3701-0000": 6 * GIB,
    "p3701-0004": 6 * GIB,
    "p3701-0005": 10 * GIB,
    "p3701-0008": 10 * GIB,
    "p3834-0000": 12 * GIB,
    "p3834-0008": 20 * GIB,
}
_SHARE: Final = 0.25
"""Of the memory of a machine that is no module we know."""

_SOFT_SHARE, _SOFT_LEAST = 0.05, 256 * MIB
_HARD_SHARE, _HARD_LEAST = 0.02, 128 * MIB


def robot_reserve_bytes(module_part: str | None, total_bytes: int) -> int:
    """The default of `scheduling.robot_reserve`."""
    known = _BY_MODULE.get(module_part or "")
    return int(total_bytes * _SHARE) if known is None else known


def soft_floor_bytes(total_bytes: int) -> int:
    """The default of `scheduling.soft_floor`."""
    return max(_SOFT_LEAST, int(total_bytes * _SOFT_SHARE))


def hard_floor_bytes(total_bytes: int) -> int:
    """The default of `scheduling.hard_floor`."""
    return max(_HARD_LEAST, int(total_bytes * _HARD_SHARE))
