"""Text out of a JSON string, however the string is cut on its way."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.decoding.json_text import JsonStringReader

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXT = st.text() | st.text(alphabet='"\\/\b\f\n\r\t\0aé🤖\ud7ff\ue000')
CUTS = st.lists(st.integers(min_value=0, max_value=200), max_size=8)


def pieces(text: str, cuts: list[int]) -> list[str]:
    """The text cut at these places."""
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def read(parts: list[str]) -> tuple[str, JsonStringReader]:
    reader = JsonStringReader()
    return "".join(reader.feed(part) for part in parts), reader


@given(TEXT, st.booleans(), CUTS)
def test_gives_back_any_text_however_it_was_cut(text: str, ascii_only, cuts: list[int]):
    written = json.dumps(text, ensure_ascii=ascii_only)[1:]
    decoded, reader = read(pieces(written, cuts))
    assert decoded == text
    assert reader.closed


@given(TEXT, st.booleans())
def test_character_by_character_is_the_same_as_whole(text: str, ascii_only):
    written = json.dumps(text, ensure_ascii=ascii_only)[1:]
    assert read(list(written))[0] == read([written])[0]


@given(st.text(alphabet='\\u"dD89aAcC0{ n'), CUTS)
def test_where_invalid_text_is_cut_makes_no_difference(text: str, cuts: list[int]):
    whole, one = read([text])
    cut, many = read(pieces(text, cuts))
    assert (cut, many.closed) == (whole, one.closed)


@given(TEXT, st.text(max_size=20))
def test_what_follows_the_closing_quote_is_ignored(text: str, rest: str):
    reader = JsonStringReader()
    assert reader.feed(json.dumps(text)[1:] + rest) == text
    assert reader.feed(rest) == ""


@given(st.text(min_size=1))
def test_no_half_of_a_surrogate_pair_ever_comes_out(text: str):
    reader = JsonStringReader()
    for character in json.dumps(text)[1:]:
        reader.feed(character).encode()  # raises for a lone surrogate


def test_a_character_comes_out_with_the_last_digit_of_its_pair():
    reader = JsonStringReader()
    out = [reader.feed(character) for character in r"\ud83e\udd16"]
    assert out == [""] * 11 + ["🤖"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"\x41", REPLACEMENT + "41"),  # no such escape
        (r"\u12g4.", REPLACEMENT + "g4."),  # no hexadecimal digit
        (r"\ud83e.", REPLACEMENT + "."),  # first half alone
        (r"\ud83e\n", REPLACEMENT + "\n"),
        (r"\ud83e\u0041", REPLACEMENT + "A"),
        (r"\ud83e\ud83e\udd16", REPLACEMENT + "🤖"),
        (r"\udd16", REPLACEMENT),  # second half alone
    ],
)
def test_an_invalid_escape_is_replaced_and_the_rest_kept(written: str, text: str):
    assert read([written + '"'])[0] == text
    assert read(list(written + '"'))[0] == text


def test_an_invalid_escape_does_not_hide_the_closing_quote():
    decoded, reader = read([r"\u12", '" : never text'])
    assert decoded == REPLACEMENT
    assert reader.closed
