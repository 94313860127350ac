"""The memory of one process, as the kernel counts it. None of a GPU driver's is in it."""

from dataclasses import dataclass
from pathlib import Path

from edge_agent.telemetry.files import parse_int, read_text
from edge_agent.telemetry.reading import Reading, failed, ok


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """`pss_bytes` counts what several processes share in parts, `rss_bytes` as a whole.

    `pss_file_bytes` of the former are pages of files.
    """

    pss_bytes: Reading[int]
    pss_file_bytes: Reading[int]
    rss_bytes: Reading[int]


def read_process_memory(sysroot: Path, pid: int) -> ProcessMemory:
    """From smaps_rollup, for the process's own user and root; RSS else from status, for anybody."""
    rollup = read_text(sysroot, f"proc/{pid}/smaps_rollup")
    rss = _size(rollup, "Rss")
    if rss.value is None:
        rss = _size(read_text(sysroot, f"proc/{pid}/status"), "VmRSS")
    return ProcessMemory(_size(rollup, "Pss"), _size(rollup, "Pss_File"), rss)


def _size(text: Reading[str], key: str) -> Reading[int]:
    """The value of a line such as `Pss:   12345 kB`."""
    if text.value is None:
        return text.parsed(lambda _: None)
    for line in text.value.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            kilobytes = parse_int(value.removesuffix("kB").strip())
            if kilobytes is not None and kilobytes >= 0:
                return ok(kilobytes * 1024, text.source)
    return failed(text.source, f"no {key} that makes sense")
