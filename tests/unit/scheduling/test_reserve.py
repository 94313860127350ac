"""What the rest of the robot gets, by module or by size; and the floors."""

import pytest

from edge_agent.scheduling.reserve import hard_floor_bytes, robot_reserve_bytes, soft_floor_bytes

GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("part", "gib"),
    [
        ("p3767-0004", 1.5),  # Orin Nano 4 GB
        ("p3767-0003", 2),  # Orin Nano 8 GB, and its developer kit
        ("p3767-0005", 2),
        ("p3767-0001", 2),  # Orin NX 8 GB
        ("p3767-0000", 4),  # Orin NX 16 GB
        ("p3701-0000", 6),  # AGX Orin 32 GB, and its developer kit
        ("p3701-0004", 6),
        ("p3701-0005", 10),  # AGX Orin 64 GB, and Industrial
        ("p3701-0008", 10),
        ("p3834-0000", 12),  # T4000
        ("p3834-0008", 20),  # T5000
    ],
)
def test_a_module_leaves_its_robot_the_same_whatever_the_kernel_keeps_of_it(part, gib):
    assert robot_reserve_bytes(part, 7 * GIB) == robot_reserve_bytes(part, 8 * GIB) == gib * GIB


@pytest.mark.parametrize("part", [None, "", "p9999-0000"])
def test_a_machine_that_is_no_known_module_leaves_a_quarter(part):
    assert robot_reserve_bytes(part, 30 * GIB + 3) == 7.5 * GIB


@pytest.mark.parametrize(
    ("total", "soft", "hard"),
    [
        (4 * GIB, 256 * MIB, 128 * MIB),  # the least
        (10_000 * MIB, 500 * MIB, 200 * MIB),
        (100_000 * MIB, 5_000 * MIB, 2_000 * MIB),
    ],
)
def test_the_floors_are_a_share_of_the_memory_and_never_nothing(total, soft, hard):
    assert (soft_floor_bytes(total), hard_floor_bytes(total)) == (soft, hard)
