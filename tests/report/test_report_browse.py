"""The page to browse examples: what it holds, read off its bytes. `test_report_browse_browser.py` opens it."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_browse_fakes import BYTES, POLICIES, hostile_examples, planned

from tutelage.records import Kind, Rendered
from tutelage.report.browse import render_browse
from tutelage.report.look import token_texts
from tutelage.report.packed import Vocabulary, pack, split_bytes, texts_of, varints
from tutelage.report.page import package_file


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_varints_can_be_read_back(values):
    """Kills: a lost high group, a continuation bit on the last group, zero written as nothing."""
    data, at, found = varints(np.array(values, np.int64)), 0, []
    while at < len(data):
        value, at = _number(data, at)
        found.append(value)
    assert found == values


@given(st.binary(max_size=40))
def test_the_texts_of_broken_bytes_join_to_what_the_tokenizer_says(raw):
    """Kills: a fast way that loses a cut character at the end, or writes another number of replacement characters."""
    ids = list(raw)
    assert "".join(texts_of(ids, BYTES)) == BYTES.decode(ids)
    assert len(texts_of(ids, BYTES)) == len(ids)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=20))
def test_the_fast_texts_are_those_of_the_slow_way(text):
    """Kills: a character given to the token that begins it by one way and to the token that ends it by the other."""
    ids = list(text.encode())
    assert split_bytes([bytes([i]) for i in ids]) == token_texts(ids, BYTES.decode)


def test_a_token_keeps_the_whole_characters_before_the_one_it_begins():
    """Kills: a space moved out of its token because a cut character follows it there."""
    assert split_bytes([b"day", b" \xe2", b"\x98\x80", b"!"]) == ["day", " ", "☀", "!"]


def test_a_tokenizer_whose_text_is_not_its_bytes_is_asked_itself():
    """Kills: bytes taken for the text where the decoder drops the first space."""
    words = {1: b" the", 2: b" cat"}
    odd = Vocabulary(lambda ids: b"".join(words[i] for i in ids).decode().removeprefix(" "), lambda i: words[i])
    assert texts_of([1, 2], odd) == ["the", " cat"]


def _header(block: bytes):
    raw = zlib.decompress(block)
    length = int.from_bytes(raw[:4], "little")
    return json.loads(raw[4 : 4 + length]), raw[4 + length :]


def test_the_block_holds_every_token_and_the_frequent_ones_come_first():
    """Kills: tokens of one example under another's, and a vocabulary whose common tokens take two bytes."""
    examples = [planned("aab", place=0), planned("aaé", place=1)]
    header, rest = _header(pack(examples, POLICIES, BYTES, {}))
    assert header["vocabulary"]["ids"] == [97, 98, 0xC3, 0xA9] and header["vocabulary"]["texts"] == ["a", "b", "", "é"]
    assert list(rest[: header["num_bytes"][0]]) == [0, 0, 1, 0, 0, 2, 3]
    assert header["vocabulary"]["bytes"] == {"2": "C3", "3": "A9"}
    assert header["examples"]["num_tokens"] == [3, 4]


def test_runs_say_kind_and_turn_of_every_token():
    """Kills: runs merged over a change of turn, or over the border of two examples."""
    kinds, turns = [0, 2, 2, 3, 3, 7], [-1, 0, 0, 1, 3, 3]
    rendered = Rendered(
        np.arange(6, dtype=np.int32), np.array(kinds, np.uint8), np.array(turns, np.int16), np.ones(4, np.float32)
    )
    header, rest = _header(pack([planned("x", rendered=rendered), planned("x", rendered=rendered)], POLICIES, BYTES, {}))
    one = [1, 0, 0, 2, 2, 1, 1, 3, 2, 1, 3, 4, 1, 7, 4]
    assert list(rest[header["num_bytes"][0] :]) == one + one


def test_weights_of_turns_are_only_written_where_one_is_not_1():
    """Kills: turn weights dropped because most are 1, and a page that grows by a list of ones per example."""
    header, _ = _header(pack([planned("ab"), planned("ab", turn_weights=[1.0, 0.3])], POLICIES, BYTES, {}))
    assert header["examples"]["turn_weights"] == [[], [1.0, float(np.float32(0.3))]]


def test_the_second_example_of_a_record_has_a_name_of_its_own():
    """Kills: two entries that one address leads to."""
    header, _ = _header(pack([planned("a", part=0), planned("a", part=1)], POLICIES, BYTES, {}))
    assert header["examples"]["name"] == ["s/f.jsonl:1", "s/f.jsonl:1~2"]


def test_no_string_of_the_data_stands_in_the_page():
    """Kills: a task or a text written into the page, where it could be markup."""
    page = render_browse(hostile_examples(), POLICIES, BYTES, title="<b>&\u202e", num_planned=2)
    assert "onerror" not in page and "<b>" not in page and "\u202e" not in page
    assert page.count("</script>") == 2
    (block,) = re.findall(r'<script id="data" type="text/plain">([A-Za-z0-9+/=]*)</script>', page)
    assert "onerror" in zlib.decompress(base64.b64decode(block)).decode(errors="replace")


def test_the_page_names_nothing_outside_itself():
    """Kills: a font, a script or an image that is fetched."""
    page = render_browse([planned("ab")], POLICIES, BYTES, title="t", num_planned=1)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=", page.split('<script id="data"')[0])
    assert "default-src &#39;none&#39;" in page and "unsafe" not in page


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_kinds_have_the_colours_of_the_report(scheme):
    """Kills: a colour changed on one page only, so that blue means user here and system there."""
    report, browse = (dict(_colours(package_file(name))[scheme]) for name in ("page.css", "browse.css"))
    assert report == browse and len(report) == len(Kind) - 1


def _colours(css: str) -> list[list[tuple[str, str]]]:
    blocks = re.split(r"@media \(prefers-color-scheme: dark\)", css)[:2]
    return [re.findall(r"--(k-\w+): (#\w+)", block) for block in blocks]
