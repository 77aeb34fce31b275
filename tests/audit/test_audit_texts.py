"""Guesses about text, copies and names of records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage import tables
from tutelage.audit.texts import RecordNames, content_keys, first_of_equal, looks_unfinished, scan_turns
from tutelage.records import Conversation, Origin, Turn

LEAD = "Water expands when it freezes, and that is why pipes burst in a hard winter if nobody empties them in time. " * 2


@pytest.mark.parametrize(
    "ending",
    [
        "The second reason is that the soil below the house moves and",
        "The second reason is that the soil below the house moves, which breaks stone, pipes,",
        "Here is the program:\n```python\ndef burst(pipe):\n    return pipe.temperature < 0",
    ],
)
def test_an_answer_that_breaks_off_is_noticed(ending: str) -> None:
    """Kills a check that never fires."""
    assert looks_unfinished(pa.array([LEAD + "\n" + ending])).tolist() == [True]


@pytest.mark.parametrize(
    "ending",
    [
        "The second reason is that the soil below the house moves in a very dry summer.",
        "The second reason is that the soil below the house moves in a very dry summer, they say: “it moves!”",
        "- the second reason, which is that the soil below the house moves in a very dry summer",
        "3. the second reason, which is that the soil below the house moves in a very dry summer",
        "B. the second reason, which is that the soil below the house moves in a very dry summer",
        "| reason | the soil below the house moves in a very dry summer and so do pipes | soil",
        "    result = burst(pipe) if pipe.temperature < freezing_point_of_water else pipe.inner_value",
        "return burst(pipe) if pipe.temperature < freezing_point_of_water else pipe.inner_value",
        "```python\nreturn pipe\n```",
        "Kind regards,\nYour plumber from the other side of the street",
        "Read on at https://example.org/a/very/long/address/of/a/page/about/frozen/pipes/in/winter",
        "น้ำขยายตัวเมื่อแข็งตัวและนั่นคือเหตุผลที่ท่อแตกในฤดูหนาวที่หนาวจัดหากไม่มีใครระบายน้ำออกทันเวลา",
        "#### 42",
        "The answer is yes",
    ],
)
def test_lists_code_verse_and_short_lines_are_left_alone(ending: str) -> None:
    """Kills a check that calls every answer without a full stop unfinished."""
    assert looks_unfinished(pa.array([LEAD + "\n" + ending])).tolist() == [False]


def test_short_answers_are_never_unfinished() -> None:
    """Kills labels, names and one-line answers reported by the thousand."""
    assert looks_unfinished(pa.array(["yes", "", " ", "a" * 199])).tolist() == [False] * 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_every_copy_points_at_the_first_of_its_equals(keys: list[tuple[int, int]]) -> None:
    """Kills a comparison of half a key, and one that names any earlier copy instead of the first."""
    array = np.array(keys, np.uint64).reshape(-1, 2)
    assert first_of_equal(array).tolist() == [keys.index(key) for key in keys]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    columns = tables.ConversationColumns()
    cut = LEAD + "The second reason is that the soil below the house moves and"
    some = [
        (Turn("user", "q"), Turn("assistant", cut)),
        (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")),
        (Turn("user", cut), Turn("assistant", "a")),
        (Turn("user", "q"), Turn("assistant", cut, weight=0.0), Turn("user", "q"), Turn("assistant", "a", weight=1.0)),
        (Turn("system", "s"), Turn("user", "q"), Turn("assistant", cut), Turn("user", "q"), Turn("assistant", "a")),
    ]
    for row, turns in enumerate(some):
        where = Origin("chat", "data/c.jsonl", 1 + row // 2, row % 2)
        columns.append(Conversation(where, turns, "t", "MIT", "human", None, bytes([row % 3] * 16), bytes(16)))
    tables.write_table(tmp_path / "conversations.parquet", columns.table())
    return tmp_path / "conversations.parquet"


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_turns_are_scanned_by_record_whatever_the_batch(records: Path, batch_rows: int) -> None:
    """Kills a system turn counted for the neighbour, user text taken for an answer, an answer of weight 0 reported."""
    system, is_cut = scan_turns(records, batch_rows=batch_rows)
    assert np.flatnonzero(system).tolist() == [1, 4]
    assert np.flatnonzero(is_cut).tolist() == [0, 4]


def test_records_have_the_names_that_people_use(records: Path) -> None:
    """Kills names that differ from `Origin.row_id`, in part or order."""
    names = RecordNames(records, "chat").of(np.array([3, 0])).to_pylist()
    assert names == [Origin("chat", "data/c.jsonl", 2, 1).row_id, Origin("chat", "data/c.jsonl", 1).row_id]


def test_keys_are_taken_by_position(records: Path) -> None:
    """Kills keys read in file order for records chosen in another."""
    assert first_of_equal(content_keys(records, np.array([4, 0, 3, 1]))).tolist() == [0, 1, 1, 0]
    assert content_keys(records, np.zeros(0, np.int64)).shape == (0, 2)
