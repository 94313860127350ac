"""The table, the picture and the document of results."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.measuring import chart
from edge_agent.measuring.results import (
    Document,
    EngineResult,
    MachineInfo,
    TemperatureResult,
    decode_document,
    encode_document,
)
from edge_agent.measuring.table import describe, number_text
from tests.support.measurements import BARE, LONG, SHORT, on_orin

SVG = "{http://www.w3.org/2000/svg}"
POSITIVE = st.floats(min_value=1e-6, max_value=1e9, allow_nan=False)


def row(lines: list[str], label: str) -> list[str]:
    """The cells of the first row with this label."""
    line = next(line for line in lines if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 - our own


def bars(root: ET.Element) -> list[ET.Element]:
    """Without those of the legend."""
    found = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "bar"]
    return [rect for rect in found if float(rect.get("x", "0")) == chart.BAR_LEFT]


class TestTable:
    def test_results_stand_side_by_side_and_unknown_is_a_dash(self):
        lines = describe([BARE, replace(BARE, engine="other", long_prompt=None)], columns=None)
        assert row(lines, "engine") == ["tiny", "other"]
        assert row(lines, "one stream") == ["48.0", "48.0"]
        assert row(lines, "short prompt, beginning cached") == ["8.2", "8.2"]
        assert row(lines, "long prompt, cold") == ["1491", "-"]
        assert row(lines, "4 streams together") == ["80.0", "80.0"]
        assert row(lines, "no power rail here") == ["-", "-"]
        assert row(lines, "no sensor here") == ["-", "-"]

    def test_columns_are_aligned(self):
        lines = describe([BARE, on_orin("15W", engine="a-longer-name")], columns=None)
        table = [line for line in lines[lines.index("") + 1 :] if re.search(r"\S  +\S", line)]
        assert len(table) > 10
        assert len({len(line) for line in table}) == 1

    def test_the_machine_and_how_it_was_measured_come_first(self):
        lines = describe([BARE], columns=None)
        assert lines[0] == "A Processor, 2 cores, Linux 6.8 x86_64"
        assert lines[1] == "power mode: this machine has none"
        assert (
            lines[2] == "medians of 3 rounds; prompts of 42 and 600 tokens, at most 128 tokens out"
        )

    def test_power_modes_of_one_machine_are_told_apart(self):
        lines = describe([on_orin("15W"), on_orin("MAXN")], columns=None)
        assert lines[0] == "Jetson Orin Nano, Orin Nano 8GB, 6 cores"
        assert lines[1] == "power mode: 15W, MAXN"
        assert row(lines, "power mode") == [":", "15W,", "MAXN"]
        assert row(lines[3:], "power mode") == ["15W", "MAXN"]
        energy = lines.index("energy per token, mJ")
        assert row(lines[energy:], "one stream") == ["125", "125"]
        assert row(lines[energy:], "after") == ["49.6", "49.6"]

    def test_several_machines_are_numbered(self):
        lines = describe([BARE, on_orin("15W")], columns=None)
        assert lines[0].startswith("machine 1  A Processor")
        assert lines[1].startswith("machine 2  Jetson Orin Nano")
        assert row(lines[3:], "machine") == ["1", "2"]
        assert row(lines[3:], "power mode") == ["-", "15W"]

    def test_what_was_measured_twice_has_its_time(self):
        later = replace(BARE, measured_at="2026-11-25T11:30:00+00:00")
        lines = describe([BARE, later], columns=None)
        assert row(lines, "measured") == ["2026-11-25T10:00", "2026-11-25T11:30"]
        assert not any(line.startswith("measured") for line in describe([BARE], columns=None))

    def test_a_long_machine_line_is_wrapped_on_a_terminal(self):
        lines = describe([on_orin("15W")], columns=30)
        assert lines[:2] == ["Jetson Orin Nano, Orin Nano", "  8GB, 6 cores"]

    @given(st.integers(1, 6), st.integers(20, 200))
    def test_no_table_is_wider_than_the_terminal_unless_one_result_is(self, count, columns):
        results = [replace(BARE, engine=f"engine-{number}") for number in range(count)]
        lines = describe(results, columns=columns)
        alone = max(map(len, describe(results[:1], columns=20)))
        assert max(map(len, lines)) <= max(columns, alone)
        shown = [cell for line in lines if line.startswith("engine ") for cell in line.split()[1:]]
        assert shown == [result.engine for result in results]

    @pytest.mark.parametrize(
        ("value", "text"), [(None, "-"), (0.0, "0.0"), (9.94, "9.9"), (10.4, "10"), (-22.0, "-22")]
    )
    def test_small_numbers_have_a_decimal_more(self, value, text):
        assert number_text(value, 0) == text


class TestChart:
    @given(st.lists(POSITIVE, min_size=1, max_size=7))
    def test_bars_are_proportional_to_their_values(self, loads):
        results = [replace(BARE, load_s=load) for load in loads]
        lengths = [float(bar.get("width", "")) for bar in bars(parse(chart.draw(results)))]
        longest = max(lengths[: len(loads)])
        for load, length in zip(loads, lengths, strict=False):
            expected = pytest.approx(
                load * longest, abs=max(loads) * 0.001
            )  # a thousandth of a pixel
            assert length * max(loads) == expected
        assert max(lengths) <= chart.BAR_RIGHT - chart.BAR_LEFT

    @given(st.lists(POSITIVE, max_size=5))
    def test_an_axis_has_few_round_numbers_and_the_largest_value_near_its_end(self, values):
        scale = chart.scale_for(values)
        assert 2 <= len(scale.ticks) <= 6
        assert scale.ticks[0] == 0
        assert scale.ticks[-1] == pytest.approx(scale.top)
        largest = max(values, default=0.5)
        assert largest <= scale.top * 1.0001
        assert largest >= scale.top * 0.4
        assert f"{scale.step:e}"[0] in "125"

    @given(st.text(max_size=30), st.text(max_size=200))
    def test_any_text_makes_well_formed_xml(self, engine, model):
        result = on_orin("<15W>", engine=engine, machine=MachineInfo(model=model))
        root = parse(chart.draw([result]))
        assert root.tag == f"{SVG}svg"

    def test_it_is_self_contained_and_every_number_is_there_as_text(self):
        svg = chart.draw([BARE, on_orin("15W")])
        texts = [text.text for text in parse(svg).iter(f"{SVG}text")]
        assert {"1491", "48.0", "125", "80.0", "1.50"} <= set(texts)
        assert "tiny, power mode 15W, machine 2" in texts
        assert "prefers-color-scheme: dark" in svg
        assert not re.search(r"href|url\(|<image|<script", svg)

    def test_all_of_it_is_inside_the_picture(self):
        root = parse(chart.draw([on_orin("15W"), on_orin("MAXN"), BARE]))
        height = float(root.get("height", ""))
        assert all(float(text.get("y", "")) < height for text in root.iter(f"{SVG}text"))
        ends = [float(bar.get("y", "")) + float(bar.get("height", "")) for bar in bars(root)]
        assert max(ends) < height

    def test_what_nobody_knows_is_left_out_and_a_single_unknown_is_a_dash(self):
        svg = chart.draw([BARE])
        assert "energy per token" not in svg
        both = chart.draw([BARE, on_orin("15W")])
        assert "energy per token" in both
        assert ">-</text>" in both

    def test_a_negative_value_has_no_bar(self):
        cold = replace(
            BARE, temperature=TemperatureResult(before_milli_c=-5000, after_milli_c=5000)
        )
        widths = [float(bar.get("width", "")) for bar in bars(parse(chart.draw([cold])))][-2:]
        assert widths == [0.0, chart.BAR_RIGHT - chart.BAR_LEFT]


class TestDocument:
    @pytest.mark.parametrize("results", [(), (BARE,), (BARE, on_orin("MAXN"))])
    def test_what_is_kept_is_read_again(self, results: tuple[EngineResult, ...]):
        document = Document(results=results)
        assert decode_document(encode_document(document)) == document

    def test_an_empty_file_is_an_empty_document(self):
        assert decode_document(b"\n") == Document()

    @pytest.mark.parametrize("raw", [b"{", b"[]", b'{"schema": 2}', b'{"results": [{}]}'])
    def test_something_else_is_refused(self, raw):
        with pytest.raises(ValueError, match=r"."):
            decode_document(raw)

    def test_keys_are_stable_and_unknown_is_null(self):
        (result,) = msgspec.json.decode(encode_document(Document(results=(BARE,))))["results"]
        assert list(result) == [
            "engine", "digest", "backend", "measured_at", "edge_agent_version", "machine",
            "settings", "worker_slots", "load_s", "short_prompt", "long_prompt",
            "streams_tokens_per_second", "memory", "power", "temperature",
        ]  # fmt: skip
        assert list(result["short_prompt"]) == list(result["long_prompt"]) == [
            "prompt_tokens", "cached_tokens", "ttft_cold_ms", "ttft_cached_ms", "tokens_per_second",
        ]  # fmt: skip
        assert set(result["power"].values()) == {None}
        assert result["short_prompt"]["ttft_cold_ms"] == SHORT.ttft_cold_ms
        assert result["long_prompt"]["ttft_cold_ms"] == LONG.ttft_cold_ms
