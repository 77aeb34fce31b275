import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from report_fakes import fake_report

from tutelage.report import tables, verdict
from tutelage.report.data import Change, ReportData, SourceFlow


def _report(*changes: Change) -> ReportData:
    return ReportData(title="t", recipe_name="t", recipe_text="", changes=changes)


def test_every_table_of_a_report_has_one_text_per_column_and_survives_json():
    """Kills: a row that lost a cell; nan written into JSON, which no other language reads."""
    data = fake_report()
    made = [
        tables.change_table(data.changes),
        tables.mixture_table(data.mixture),
        tables.realised_table(data.mixture),
        tables.accounting_table(data.accounts),
        tables.flow_table(data.flows),
        tables.steps_table(data.plan_facts),
        tables.finding_table(data.audit["findings"]),
        tables.supervision_table({**data.audit["sources"], "none": {"num_examples": 0, "num_records": 0, "num_with_system": 0}}),
    ]
    for table in made:
        assert all(len(row) == len(table.columns) for row in table.texts())
        json.dumps(table.as_json(), allow_nan=False)


def test_the_flow_table_adds_up_in_rows_and_columns():
    """Kills: a total row that leaves out a source, or a fate without a column."""
    table = tables.flow_table(fake_report().flows)
    *rows, total = table.rows
    assert all(row[1] == sum(row[2:]) for row in table.rows)
    assert [sum(row[i] for row in rows) for i in range(1, len(total))] == list(total[1:])


def test_shares_are_of_the_unit_and_not_of_examples():
    """Kills: one share shown in all three columns."""
    data = fake_report()
    rows = [row for row in tables.mixture_table(data.mixture).as_json() if row["task"]]
    for key, amount in (("share_examples", "examples"), ("share_tokens", "tokens"), ("share_supervised", "supervised")):
        whole = sum(getattr(task.planned, amount) for task in data.mixture)
        assert [row[key] for row in rows] == [getattr(task.planned, amount) / whole for task in data.mixture]
        assert math.isclose(sum(row[key] for row in rows), 1.0)


@given(st.floats(allow_infinity=False), st.sampled_from(["count", "share", "loss", "change", "ratio", "text"]))
@settings(max_examples=60, deadline=None)
def test_any_number_can_be_written(value, style):
    """Kills: a formatter that fails on nan, on -0.0 or on huge numbers; a `-0.000` or `+0.000` that claims a direction."""
    text = tables.write(value, style)
    assert text and (style != "change" or text not in ("+0.000", "−0.000"))


def test_a_flow_whose_fates_do_not_add_up_is_refused():
    """Kills: a page that quietly loses records."""
    try:
        SourceFlow("maths", 10, {"planned": 9})
    except AssertionError as error:
        assert "add up" in str(error)
    else:
        raise AssertionError("accepted")


def test_an_interval_that_holds_zero_is_never_called_a_gain():
    """Kills: a verdict read off the two means."""
    text = verdict.headline(_report(Change("", 9, 90, 2.0, 1.9, -0.25, 0.05)))
    assert text.startswith("No clear change") and "includes 0" in text and "fell" not in text


def test_a_worse_model_is_called_worse():
    """Kills: an absolute change; a verdict that only knows good news."""
    assert "worse" in verdict.headline(_report(Change("", 9, 90, 2.0, 2.3, 0.2, 0.4)))


def test_an_interval_that_touches_zero_is_unclear():
    """Kills: `<=` where `<` is meant."""
    assert Change("t", 2, 2, 2.0, 1.9, -0.2, 0.0).outcome == Change("t", 2, 2, 2.0, 2.1, 0.0, 0.2).outcome == "unclear"


def test_a_total_without_an_interval_says_so():
    """Kills: nan compared with 0 and then called a gain."""
    nan = float("nan")
    text = verdict.headline(_report(Change("", 1, 9, 2.0, 1.0, nan, nan)))
    assert "too few" in text and "nan" not in text


def test_losing_tasks_are_named_first():
    """Kills: a summary in which the one task that got worse is buried."""
    lines = verdict.by_task(fake_report().task_changes)
    assert lines[0] == "Worse: riddles +0.071."
    assert "Cannot be told from chance: qa −0.012." in lines and "Never trained on: riddles." in lines
    assert not any("Every task" in line for line in lines)


def test_every_task_got_better_is_said_only_when_it_is_so():
    """Kills: the sentence printed whenever nothing got worse."""
    better, unclear = Change("a", 2, 2, 2.0, 1.0, -1.2, -0.8), Change("b", 2, 2, 2.0, 1.9, -0.3, 0.1)
    assert "Every task got better." in verdict.by_task([better, better])
    assert "Every task got better." not in verdict.by_task([better, unclear])


def test_records_that_were_never_wanted_are_not_called_dropped():
    """Kills: a sample of a large source reported as thousands of dropped records."""
    flow = SourceFlow("maths", 10, {"planned": 2, "held_out": 1, "not_drawn": 2, "not_sampled": 4, "overlong": 1})
    assert flow.num_dropped == 1
    assert tables.fate_order([flow]) == ["planned", "held_out", "not_drawn", "not_sampled", "overlong"]
