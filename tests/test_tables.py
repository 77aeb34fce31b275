"""Reading conversations as columns: what the rooms that take batches rely on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.records import ROLES, Conversation, Origin, Turn
from tutelage.tables import ConversationColumns, TurnColumns, read_turns

OPTIONAL = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
TURNS = st.builds(
    Turn,
    role=st.sampled_from(ROLES),
    content=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    reasoning=OPTIONAL,
    tool_calls=OPTIONAL,
    name=OPTIONAL,
    call_id=OPTIONAL,
    weight=st.none() | st.sampled_from([0.0, 0.5, 1.0]),
)
PLAIN_TURNS = st.builds(Turn, role=st.sampled_from(ROLES), content=st.sampled_from(["", "a", "é"]))
CONVERSATIONS = st.builds(
    Conversation,
    where=st.builds(Origin, st.just("s"), st.just("f"), st.integers(1, 9)),
    turns=st.lists(TURNS | PLAIN_TURNS, max_size=4).map(tuple),
    task=st.sampled_from(["maths", "code"]),
    licence=st.just("MIT"),
    origin=st.just("human"),
    tools=OPTIONAL,
    content_key=st.just(b"c" * 16),
    prompt_key=st.just(b"p" * 16),
)


def entry(column: list[str | None] | None, index: int) -> str | None:
    return None if column is None else column[index]


def turn(batch: TurnColumns, index: int) -> Turn:
    weight = math.nan if batch.weight is None else float(batch.weight[index])
    optional = [entry(each, index) for each in (batch.reasoning, batch.tool_calls, batch.name, batch.call_id)]
    return Turn(ROLES[batch.role[index]], batch.content[index], *optional, None if math.isnan(weight) else weight)


@given(st.lists(CONVERSATIONS, max_size=8), st.integers(1, 4), st.integers(1, 9))
def test_turns_read_in_batches_are_the_turns_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[Conversation], batch_rows: int, group: int
) -> None:
    """Kills flat columns that forget a batch's offset, a null read as a text, and rows numbered anew in every row group."""
    columns = ConversationColumns()
    for record in records:
        columns.append(record)
    path = tmp_path_factory.mktemp("turns") / "conversations.parquet"
    pq.write_table(columns.table(), path, row_group_size=group)
    rows = 0
    for batch in read_turns(path, batch_rows=batch_rows):
        assert (batch.first_row, len(batch) <= batch_rows) == (rows, True)
        assert (batch.num_turns.dtype, batch.role.dtype, batch.task_codes.dtype) == (np.int32, np.uint8, np.int32)
        offsets = batch.offsets
        for i in range(len(batch)):
            record = records[rows + i]
            assert tuple(turn(batch, j) for j in range(offsets[i], offsets[i + 1])) == record.turns
            assert batch.task_names[batch.task_codes[i]] == record.task
            assert entry(batch.tools, i) == record.tools
        for name in ("reasoning", "tool_calls", "name", "call_id", "weight"):
            some = any(getattr(each, name) is not None for record in records[rows : rows + len(batch)] for each in record.turns)
            assert (getattr(batch, name) is not None) == some
        rows += len(batch)
    assert rows == len(records)


def test_texts_that_were_read_are_let_go(tmp_path: Path) -> None:
    """Kills a reader that keeps all that it has read of a file: here ten row groups of two megabytes."""
    columns = ConversationColumns()
    for line in range(1, 201):
        turns = (Turn("user", "q"), Turn("assistant", f"{line % 10}" * 100_000))
        columns.append(Conversation(Origin("s", "f", line), turns, "t", "MIT", "human", None, b"c" * 16, b"p" * 16))
    path = tmp_path / "conversations.parquet"
    pq.write_table(columns.table(), path, row_group_size=20, compression="none", use_dictionary=False)
    del columns
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_turns(path, batch_rows=20):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 2e6 < most < 8e6


def test_the_first_batch_is_given_before_later_row_groups_are_read(tmp_path: Path) -> None:
    """Kills a reader that holds the whole file: here its second half cannot be read."""
    columns = ConversationColumns()
    for line in range(1, 101):
        turns = (Turn("user", "q"), Turn("assistant", f"{line}" * 1_000))
        columns.append(Conversation(Origin("s", "f", line), turns, "t", "MIT", "human", None, b"c" * 16, b"p" * 16))
    path = tmp_path / "conversations.parquet"
    pq.write_table(columns.table(), path, row_group_size=50)
    second = pq.ParquetFile(path).metadata.row_group(1)
    texts = next(c for c in map(second.column, range(second.num_columns)) if c.path_in_schema.endswith("content"))
    with path.open("r+b") as file:
        file.seek(texts.dictionary_page_offset)
        file.write(b"\xff" * 99)
    batches = read_turns(path, batch_rows=25)
    assert [len(next(batches).content), next(batches).first_row] == [50, 25]
    with pytest.raises((OSError, pa.ArrowException)):
        list(batches)
