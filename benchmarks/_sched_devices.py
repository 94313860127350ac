"""Devices and engines that the scheduler benchmark simulates: no I/O, nothing measured here.

Decode rates of one stream come from published measurements where a name carries no "assumed";
elsewhere from the rule that they are about 60 % of memory bandwidth over the bytes read a token.
Eight streams together give 4.7 times one (published for 3B to 8B on Orin and Thor: 4.6 to 5.6).

Assumed, since no figure was found: prompts are read 25 times as fast as one stream is written; a
load is 2 s for the process, its CUDA context and libraries, and then the file at the disk's speed
(Orin Nano and NX 1.5 GB/s, AGX 2, Thor 3, deserialisation included); while loading, a tenth of the
file, at most 512 MiB, is held twice. Usable memory is published for Orin Nano and Thor and scaled
for the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from edge_agent.scheduling.values import EngineFacts, Footprint, Rules
from edge_agent.units import GIB, MIB

LOAD_START_S = 2.0
PREFILL_FACTOR = 25.0
BATCH8_RATIO = 4.7
_STAGING_SHARE = 0.1
_STAGING_MOST_BYTES = 512 * MIB
_GB = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Engine:
    """An installed engine on one device. `decode_tokens_s` is of one stream."""

    name: str
    load_s: float
    peak_bytes: int
    steady_bytes: int
    decode_tokens_s: float
    slots: int

    @property
    def prefill_tokens_s(self) -> float:
        """How fast a prompt is read."""
        return self.decode_tokens_s * PREFILL_FACTOR

    def facts(self) -> EngineFacts:
        """What the scheduler knows of it."""
        footprint = Footprint(self.peak_bytes, self.steady_bytes)
        return EngineFacts(self.name, footprint, self.slots, self.slots * 4096, self.load_s)


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of machine. `others_bytes` is what other processes use when they are at rest.

    `engines` go from small to large. `pair` are two that do not fit in memory together.
    """

    name: str
    total_bytes: int
    others_bytes: int
    reserve_bytes: int
    engines: tuple[Engine, ...]
    pair: tuple[str, str]

    def rules(self) -> Rules:
        """Of a daemon that may have eight engines in memory and never refuses for length."""
        return Rules(
            reserve_bytes=self.reserve_bytes,
            soft_floor_bytes=self.soft_floor_bytes,
            hard_floor_bytes=self.hard_floor_bytes,
            max_waiting_steps=1_000_000,
        )

    @property
    def soft_floor_bytes(self) -> int:
        """Below it nothing is loaded."""
        return max(384 * MIB, self.total_bytes // 25)

    @property
    def hard_floor_bytes(self) -> int:
        """Below it the robot itself is in danger."""
        return self.soft_floor_bytes // 3

    def engine(self, name: str) -> Engine:
        """The engine of this name."""
        return next(engine for engine in self.engines if engine.name == name)

    def count_that_fits(self, names: Iterable[str]) -> int:
        """How many of these fit whichever they are: what who counts engines must set."""
        left = self.total_bytes - self.reserve_bytes
        sizes = sorted((self.engine(name).peak_bytes for name in names), reverse=True)
        for count, size in enumerate(sizes):
            left -= size
            if left < 0:
                return max(1, count)
        return max(1, len(sizes))


def _engine(
    name: str, file_gb: float, steady_gib: float, decode: float, disk_gb_s: float, slots: int
) -> Engine:
    steady = int(steady_gib * GIB)
    staging = min(int(file_gb * _GB * _STAGING_SHARE), _STAGING_MOST_BYTES)
    load_s = LOAD_START_S + file_gb / disk_gb_s
    return Engine(name, load_s, steady + staging, steady, decode, slots)


ORIN_NANO_8 = Device(
    "Orin Nano 8 GB",
    7607 * MIB,
    1200 * MIB,
    2 * GIB,
    (
        _engine("0.6b-assumed", 0.5, 0.9, 110, 1.5, 2),
        _engine("1.2b", 0.8, 1.3, 54, 1.5, 2),
        _engine("1.7b", 1.1, 1.8, 64.5, 1.5, 2),
        _engine("3b", 1.9, 2.7, 43.07, 1.5, 2),
        _engine("3.8b", 2.5, 3.7, 38.1, 1.5, 2),
    ),
    ("3b", "3.8b"),
)
ORIN_NX_16 = Device(
    "Orin NX 16 GB",
    15656 * MIB,
    1600 * MIB,
    3 * GIB,
    (
        _engine("1.7b", 1.1, 2.2, 64.5, 1.5, 4),
        _engine("3b", 1.9, 3.6, 43.07, 1.5, 4),
        _engine("3.8b", 2.5, 4.8, 38.1, 1.5, 4),
        _engine("7b", 4.7, 6.6, 21.75, 1.5, 4),
        _engine("8b", 5.0, 7.1, 19.14, 1.5, 4),
    ),
    ("7b", "8b"),
)
AGX_ORIN_64 = Device(
    "AGX Orin 64 GB",
    62_800 * MIB,
    4 * GIB,
    8 * GIB,
    (
        _engine("4b", 2.5, 5.0, 52.2, 2.0, 4),
        _engine("8b", 5.0, 8.0, 26.53, 2.0, 4),
        _engine("14b-assumed", 9.0, 14.0, 13.6, 2.0, 4),
        _engine("30b-a3b-assumed", 18.0, 25.0, 45.0, 2.0, 4),
        _engine("32b-assumed", 19.0, 30.0, 6.5, 2.0, 4),
    ),
    ("30b-a3b-assumed", "32b-assumed"),
)
THOR_128 = Device(
    "Thor 128 GB",
    125_772 * MIB,
    6 * GIB,
    12 * GIB,
    (
        _engine("4b", 2.5, 6.0, 76.4, 3.0, 8),
        _engine("8b", 5.0, 10.0, 54.9, 3.0, 8),
        _engine("32b-assumed", 19.0, 34.0, 8.6, 3.0, 8),
        _engine("120b-a5b-assumed", 63.0, 75.0, 45.0, 3.0, 8),
        _engine("70b-assumed", 42.0, 56.0, 3.9, 3.0, 8),
    ),
    ("120b-a5b-assumed", "70b-assumed"),
)
DEVICES = (ORIN_NANO_8, ORIN_NX_16, AGX_ORIN_64, THOR_128)
