import numpy as np
import pytest
import yaml
from report_artefacts import example, finished_run

from tutelage.records import Kind
from tutelage.report.card import model_card
from tutelage.report.gather import gather
from tutelage.report.spec import ReportSpec
from tutelage.report.stage import report_stage
from tutelage.report.summary import run_summary


def _weigh(rendered):
    return np.isin(rendered.kinds, [Kind.ASSISTANT, Kind.STOP]).astype(np.float32)


def _gather(fakes, **spec):
    return gather(fakes.artefacts, title="t", recipe="name: t", name="t", spec=ReportSpec(**spec), weigh=_weigh)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def data(fakes):
    return _gather(fakes)


def test_every_line_read_has_one_fate(data):
    """Kills: malformed lines left out of the account, or a record counted as dropped by two stages."""
    fates = {flow.source: dict(flow.fates) for flow in data.flows}
    assert fates["maths"] == {"planned": 6, "held_out": 1, "exact_duplicate": 1, "overlong": 1, "not_drawn": 1, "broken_json": 2}
    assert fates["chat"] == {"planned": 4, "held_out": 1}


def test_a_dropped_record_can_be_opened_though_the_plan_knows_only_its_number(data):
    """Kills: a list of reasons without file, line and text."""
    shown = {(group.source, group.reason): group.shown[0] for group in data.dropped}
    copy = shown["maths", "exact_duplicate"]
    assert (copy.file, copy.line, copy.detail) == ("maths.jsonl", 2, "equal to maths/maths.jsonl:4")
    held = shown["chat", "held_out"]
    assert (held.file, held.line) == ("chat.jsonl", 1) and held.excerpt.startswith("chat question 0?")
    assert shown["maths", "overlong"].detail == "2,311 tokens, at most 64"
    assert shown["maths", "broken_json"].excerpt == '{"a": "b'


def test_the_list_of_drops_is_capped_and_the_total_is_not(fakes):
    """Kills: a total that counts what is shown."""
    groups = {(g.source, g.reason): g for g in _gather(fakes, num_dropped=1).dropped}
    assert groups["maths", "broken_json"].total == 2 and len(groups["maths", "broken_json"].shown) == 1


def test_realised_counts_the_steps_that_were_taken(data):
    """Kills: the plan repeated as what happened, after a run that stopped early."""
    realised = {task.task: task.realised for task in data.mixture}
    assert realised["maths"].examples == 6 and realised["chat"].examples == 0
    assert realised["maths"].tokens == sum(len(example("maths", row).ids) for row in range(3, 9))
    assert realised["maths"].supervised == 54


def test_changes_take_the_paired_interval_and_leave_unknown_ones_open(data):
    """Kills: the interval of the loss itself shown as that of its change."""
    changes = {change.task: change for change in data.changes}
    assert (changes[""].low, changes[""].high) == (-0.6, -0.4) and changes[""].num_items == 2
    assert changes["chat"].low != changes["chat"].low  # nan: no paired score of that task
    assert changes["maths"].change == -0.5


def test_curves_are_per_task_and_per_token(data):
    """Kills: a sum of losses drawn as a loss."""
    curves = {(curve.task, curve.part): curve for curve in data.curves}
    assert curves["", "train"].values == (2.0, 1.9, 1.8)
    assert curves["maths", "train"].values == (2.0, 11 / 6, 10 / 6)
    assert curves["maths", "held-out"].steps == (0, 3)


def test_samples_are_paired_by_record(data):
    """Kills: before and after joined by position."""
    assert {pair.task: (pair.before.output, pair.after.output) for pair in data.samples} == {
        "maths": ("before said", "after said"),
        "chat": ("before said", "after said"),
    }


def test_examples_show_the_tokens_with_the_weights_of_training(data):
    """Kills: the source's weight forgotten; a rewritten record shown from its first rendering; text that lost characters."""
    shown = {shown.row_id: shown for shown in data.examples}
    assert len(shown) == 10
    chat = shown["chat/chat.jsonl:5"]
    assert {run.weight for run in chat.runs} == {0.0, 0.5}
    assert (
        "".join(run.text for run in chat.runs)
        == "<|im_start|>user\nchat question 4?<|im_end|>\n<|im_start|>assistant\nanswer 4<|im_end|>"
    )
    assert chat.num_supervised == len("answer 4") + 1


def test_examples_take_turns_between_tasks(fakes):
    """Kills: the first examples of the first task only."""
    assert {example.task for example in _gather(fakes, num_examples=2).examples} == {"maths", "chat"}


def test_edits_and_licences_are_counted(data):
    """Kills: licences of records that were not trained on; edits forgotten."""
    assert data.rewritten == {"strip_boilerplate": 1}
    assert data.licences == {"MIT": 6, "Apache-2.0": 4}


def test_a_report_can_be_made_as_soon_as_there_is_a_plan(tmp_path):
    """Kills: a page that needs a trained model to show where the data went."""
    fakes = finished_run(tmp_path, is_trained=False)
    data = _gather(fakes)
    assert data.changes == () and data.mixture[0].realised is None and data.flows


def test_the_stage_writes_a_page_and_a_card_and_is_a_hit_the_second_time(fakes):
    """Kills: a key that depends on the clock; a stage that takes itself for its input."""
    boxes = dict(fakes.stages)
    stage = report_stage(boxes, recipe="name: t", name="t", spec=ReportSpec(), weigh=_weigh, model="base")
    boxes[stage.label] = stage
    made = fakes.store.produce(stage, fakes.artefacts)
    assert made.file("report.html").stat().st_size < 1_000_000
    again = report_stage(boxes, recipe="name: t", name="t", spec=ReportSpec(), weigh=_weigh, model="base")
    assert again.key == stage.key and fakes.store.produce(again, fakes.artefacts).is_hit
    other = report_stage(boxes, recipe="name: u", name="t", spec=ReportSpec(), weigh=_weigh, model="base")
    assert other.key != stage.key
    head = made.file("model_card.md").read_text().split("---")[1]
    assert yaml.safe_load(head)["base_model"] == "base"


def test_the_card_keeps_text_from_data_as_text():
    """Kills: a licence or task name that opens a link or a tag in the card."""
    from report_fakes import hostile_report

    body = model_card(hostile_report()).split("---", 2)[2]
    assert "<img" not in body.replace("\\<img", "") and "\x00" not in body


def test_the_summary_tells_the_same_numbers(fakes):
    """Kills: a second computation of the same facts for the terminal."""
    summary = run_summary(fakes.artefacts, folder=fakes.store.root)
    assert summary.as_json()["held_out_loss"][-1]["change"] == -0.5
    assert next(table.caption for table in summary.tables()).startswith("Held-out loss")
    assert summary.lines()[0].startswith("Held-out loss fell from 2.000 to 1.500")
