"""Row ids to records and back, and what is said of a record that is not planned."""

from pathlib import Path

import pytest
from report_artefacts import Fakes, finished_run

from tutelage import tables
from tutelage.errors import DataError
from tutelage.records import Conversation, Origin, Turn
from tutelage.report.rows import find_record, row_ids, why_not_planned
from tutelage.store import Counts, Store

PLACES = [("a.jsonl", 1, 0), ("a.jsonl", 11, 0), ("b/a.jsonl", 1, 0), ("b/a.jsonl", 1, 1), ("c:1.jsonl", 2, 0)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("rows"), is_trained=False).artefacts


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One source with several files, a line that holds two records, and a colon in a file's name."""

    def write(folder: Path) -> None:
        columns = tables.ConversationColumns()
        for file, line, part in PLACES:
            turns = (Turn("user", "q"), Turn("assistant", "a"))
            columns.append(Conversation(Origin("s", file, line, part), turns, "t", "MIT", "human", None, bytes(16), bytes(16)))
        tables.write_table(folder / "conversations.parquet", columns.table())

    fakes = Fakes(Store(tmp_path_factory.mktemp("odd")))
    fakes.add("read s", write, Counts(len(PLACES), len(PLACES)))
    return fakes.artefacts


def test_every_row_id_leads_back_to_its_record(odd):
    """Kills: parts of a line that share a name, a colon in a file's name taken for the line's."""
    ids = row_ids(odd, ["s"] * len(PLACES), range(len(PLACES)))
    assert ids == ["s/a.jsonl:1", "s/a.jsonl:11", "s/b/a.jsonl:1", "s/b/a.jsonl:1#1", "s/c:1.jsonl:2"]
    assert [find_record(odd, row_id) for row_id in ids] == [("s", row) for row in range(len(PLACES))]


def test_the_end_of_a_row_id_is_enough_where_it_is_unique(odd, run):
    """Kills: line 1 found where 11 was meant, a full id refused because another one ends in it, the first of several taken."""
    assert find_record(odd, ":11") == ("s", 1) and find_record(odd, "b/a.jsonl:1#1") == ("s", 3)
    assert find_record(run, "chat.jsonl:5") == ("chat", 4)
    with pytest.raises(DataError, match=r"--row a.jsonl:1: 2 records end so.*s/a.jsonl:1, s/b/a.jsonl:1"):
        find_record(odd, "a.jsonl:1")


@pytest.mark.parametrize(
    ("row_id", "said"),
    [
        ("maths/maths.jsonl:90", "set aside by `read maths`: broken_json (line ends inside a string)"),
        ("maths/maths.jsonl:40", "no record stands there; the last ones are maths/maths.jsonl:10"),
        ("maths/moths.jsonl:3", "did you mean `maths/maths.jsonl`?"),
        ("maths.jsonl", "a row id is source/file:line"),
    ],
)
def test_a_row_that_was_never_read_is_explained(run, row_id, said):
    """Kills: "no example fits" for a line that reading refused, or for a slip of the pen."""
    with pytest.raises(DataError) as error:
        find_record(run, row_id)
    assert said in str(error.value) and str(error.value).startswith(f"--row {row_id}: ")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (0, "maths/maths.jsonl:1 is not in the plan: held_out, said by `plan` (kept for measuring, never trained)"),
        (1, "maths/maths.jsonl:2 is not in the plan: exact_duplicate, said by `copies`"),
        (2, "maths/maths.jsonl:3 is not in the plan: overlong, said by `render maths` (2,311 tokens, at most 64)"),
        (9, "maths/maths.jsonl:10 is not in the plan: not_drawn, said by `plan` (the budget of `mix` went to other records)"),
    ],
)
def test_a_record_outside_the_plan_has_its_reason_and_the_stage_that_gave_it(run, row, said):
    """Kills: a reason without the stage, the detail of another stage's judgement, a reason of the next record."""
    assert why_not_planned(run, "maths", row).startswith(said)
