"""Memory, swap and pressure below a sysroot: what is there, what is missing, what is garbage."""

import os
from pathlib import Path

import pytest

from edge_agent.telemetry import procfs
from edge_agent.telemetry.files import names_in, parse_int, read_text
from edge_agent.telemetry.reading import Reading, ReadingStatus
from tests.support import sysroots

KIB = 1024


def test_every_field_of_meminfo_in_bytes(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    memory = procfs.read_memory(tmp_path)
    assert memory.total_bytes.value == 7_789_568 * KIB
    assert memory.free_bytes.value == 65_536 * KIB
    assert memory.available_bytes.value == 5_242_880 * KIB
    assert memory.swap_total_bytes.value == memory.swap_free_bytes.value == 3_894_784 * KIB
    assert memory.cma_total_bytes.value == 262_144 * KIB
    assert memory.cma_free_bytes.value == 200_000 * KIB
    assert memory.nvmap_used_bytes.value == 1_048_576 * KIB
    assert memory.available_bytes.source == "/proc/meminfo"


def test_huge_pages_are_counts_and_their_size_is_bytes(tmp_path: Path):
    pages = ("HugePages_Total:       8", "HugePages_Free:        3", "Hugepagesize:       2048 kB")
    sysroots.put(tmp_path, {"proc/meminfo": sysroots.meminfo(1000, 500, *pages)})
    memory = procfs.read_memory(tmp_path)
    assert memory.huge_pages.value == 8
    assert memory.huge_pages_free.value == 3
    assert memory.huge_page_bytes.value == 2048 * KIB


def test_what_a_machine_does_not_have_is_unsupported_and_never_0(tmp_path: Path):
    sysroots.plain_pc(tmp_path)
    memory = procfs.read_memory(tmp_path)
    for reading in (memory.cma_total_bytes, memory.nvmap_used_bytes, memory.swap_total_bytes):
        assert (reading.value, reading.status) == (None, ReadingStatus.UNSUPPORTED)
    assert memory.available_bytes.status is ReadingStatus.OK


@pytest.mark.parametrize(
    "value", ["", "kB", "-1 kB", "1e9 kB", "١٢ kB", "12", "12 MB", "9" * 30 + " kB"]
)
def test_a_size_that_makes_no_sense_is_an_error(tmp_path: Path, value: str):
    sysroots.put(tmp_path, {"proc/meminfo": f"MemTotal: 1000 kB\nMemAvailable: {value}\n"})
    memory = procfs.read_memory(tmp_path)
    assert (memory.available_bytes.value, memory.available_bytes.status) == (None, "error")
    assert "MemAvailable" in memory.available_bytes.detail
    assert memory.total_bytes.value == 1000 * KIB


def test_0_is_a_value_where_the_kernel_says_so(tmp_path: Path):
    sysroots.put(tmp_path, {"proc/meminfo": sysroots.meminfo(1000, 500, "SwapTotal: 0 kB")})
    reading = procfs.read_memory(tmp_path).swap_total_bytes
    assert (reading.value, reading.status) == (0, ReadingStatus.OK)


@pytest.mark.parametrize(("value", "status"), [(None, "ok"), (None, "stale"), (1, "error")])
def test_a_reading_has_a_value_exactly_where_its_status_says_so(value: int | None, status: str):
    with pytest.raises(ValueError, match="/somewhere"):
        Reading(value, "/somewhere", ReadingStatus(status))
    assert Reading(1, "/somewhere", ReadingStatus.STALE).value == 1


def test_no_meminfo_is_unsupported(tmp_path: Path):
    assert procfs.read_memory(tmp_path).total_bytes.status is ReadingStatus.UNSUPPORTED


def test_a_directory_in_the_place_of_meminfo_is_an_error(tmp_path: Path):
    (tmp_path / "proc/meminfo").mkdir(parents=True)
    memory = procfs.read_memory(tmp_path)
    assert memory.total_bytes.status is memory.huge_pages.status is ReadingStatus.ERROR


def test_swap_areas_with_zram_told_apart(tmp_path: Path):
    lines = "/dev/zram0 partition 1000 10 5\n/swap\\040file file 2000 0 -2\n"
    sysroots.put(tmp_path, {"proc/swaps": f"Filename Type Size Used Priority\n{lines}"})
    zram, disk = procfs.read_swaps(tmp_path).value or ()
    assert (zram.size_bytes, zram.used_bytes, zram.is_zram) == (1000 * KIB, 10 * KIB, True)
    assert (disk.size_bytes, disk.used_bytes, disk.is_zram) == (2000 * KIB, 0, False)


def test_no_swap_is_known_to_be_none(tmp_path: Path):
    sysroots.plain_pc(tmp_path)
    assert procfs.read_swaps(tmp_path).value == ()


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "Filename\n/dev/sda1 partition", "Filename\na b c d", "Filename\na b 1 d"],
)
def test_garbage_for_swaps_is_an_error(tmp_path: Path, text: str):
    sysroots.put(tmp_path, {"proc/swaps": text})
    assert procfs.read_swaps(tmp_path).status is ReadingStatus.ERROR


def test_pressure(tmp_path: Path):
    sysroots.put(
        tmp_path,
        {
            "proc/pressure/memory": "some avg10=1.50 avg60=2.25 avg300=0.00 total=17\n"
            "full avg10=0.50 avg60=0.75 avg300=0.00 total=5\n"
        },
    )
    assert procfs.read_pressure(tmp_path).value == procfs.Pressure(1.5, 2.25, 17, 0.5, 0.75, 5)


def test_a_kernel_without_pressure_is_unsupported_and_half_of_it_an_error(tmp_path: Path):
    assert procfs.read_pressure(tmp_path).status is ReadingStatus.UNSUPPORTED
    sysroots.put(tmp_path, {"proc/pressure/memory": sysroots.PRESSURE.splitlines()[0]})
    assert procfs.read_pressure(tmp_path).status is ReadingStatus.ERROR


@pytest.mark.parametrize(
    ("counts", "pages"), [("5 0 0", 1), ("0 0 7", 4), ("1 1 0", 2), ("0 0 0", 0)]
)
def test_the_largest_free_block(tmp_path: Path, counts: str, pages: int):
    small = "Node 0, zone DMA 1 0 0\n" if pages else ""
    sysroots.put(tmp_path, {"proc/buddyinfo": f"Node 0, zone Normal {counts}\n{small}"})
    expected = pages * os.sysconf("SC_PAGE_SIZE")
    assert procfs.read_largest_free_block_bytes(tmp_path).value == expected


@pytest.mark.parametrize("text", ["", "Node 0", "Node 0, zone Normal 1 x", "a zone b" + " 1" * 40])
def test_garbage_for_free_blocks_is_an_error(tmp_path: Path, text: str):
    sysroots.put(tmp_path, {"proc/buddyinfo": text})
    assert procfs.read_largest_free_block_bytes(tmp_path).status is ReadingStatus.ERROR


def test_text_is_bounded_stripped_and_never_waits_for_a_pipe(tmp_path: Path):
    sysroots.put(
        tmp_path, {"big": b"x" * (64 * KIB + 1), "fits": b"x" * 64 * KIB, "odd": b" a\xff\0\n"}
    )
    assert read_text(tmp_path, "big").status is ReadingStatus.ERROR
    assert len(read_text(tmp_path, "fits").value or "") == 64 * KIB
    assert read_text(tmp_path, "odd").value == "a\N{REPLACEMENT CHARACTER}"
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path, "pipe").value == ""


def test_numbers_are_plain_digits_within_64_bits():
    assert parse_int("-12") == -12
    assert [parse_int(text) for text in ("", "1_0", " 1", "٣", "9" * 19, "0x1", "1.0")] == [
        None
    ] * 7


def test_numbered_names_are_in_numeric_order(tmp_path: Path):
    for name in ("zone10", "zone9", "zone1", "other", "zone²"):
        (tmp_path / name).touch()
    assert names_in(tmp_path, "") == ("other", "zone1", "zone9", "zone10", "zone²")
    assert names_in(tmp_path, "missing") == ()
