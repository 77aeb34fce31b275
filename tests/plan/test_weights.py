"""Weights: which tokens each rule trains, and the shift."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import LAYOUT, example

from tutelage.plan.batch import InMemory
from tutelage.plan.spec import FullLoss, InstructionModelling, KindWeights, LastResponse, LossRule, PromptWeight, ResponseLoss
from tutelage.plan.weights import shift_targets, weigh_examples, weigh_tokens
from tutelage.records import NO_TARGET, Kind, Rendered

TWO_TURNS = example("yy su sae su srraae")
MARKED = example("su smrmaae su sae su smrme")
RULES: list[LossRule] = [
    ResponseLoss(),
    InstructionModelling(),
    FullLoss(),
    LastResponse(),
    PromptWeight(prompt_weight=0.25),
    KindWeights(weights={"assistant": 1.0, "stop": 2.0, "user": 0.5}),
    *(rule(turns="last") for rule in (ResponseLoss, InstructionModelling)),
    PromptWeight(prompt_weight=0.25, turns="last"),
    KindWeights(weights={"assistant": 0.5, "scaffold": 0.25, "user": 0.5}, turns="last"),
]


def trained(rendered: Rendered, loss: LossRule) -> str:
    """One character per token: `.` for weight 0, `1` for 1, `+` for anything else."""
    weights = weigh_tokens(rendered.kinds, loss=loss, turns=rendered.turns, turn_weights=rendered.turn_weights)
    assert weights.dtype == np.float32
    return "".join("." if w == 0 else "1" if w == 1 else "+" for w in weights)


#                      y y s u s a e s u s r r a a e
def test_response_trains_answers_and_stops() -> None:
    """Kills flipped polarity, and training on prompts, system text or template."""
    assert trained(TWO_TURNS, ResponseLoss()) == ".....11...11111"


def test_every_assistant_turn_is_trained_and_no_user_turn_between() -> None:
    """Kills "everything after the first assistant header"."""
    weights = weigh_tokens(TWO_TURNS.kinds)
    assert weights[TWO_TURNS.kinds == Kind.USER].sum() == 0
    assert set(TWO_TURNS.turns[weights > 0].tolist()) == {2, 4}


def test_last_response_trains_the_last_answer_only() -> None:
    """Kills a last turn found over the whole pack instead of per document."""
    assert trained(TWO_TURNS, LastResponse()) == "..........11111"
    assert trained(example("su sae su"), LastResponse()) == "...11.."


def test_instruction_modelling_trains_no_template_token_and_no_system_prompt() -> None:
    """Kills "every token but padding", which rewards copying the template."""
    assert trained(TWO_TURNS, InstructionModelling()) == "...1.11.1.11111"


def test_full_prompt_weight_and_kinds_do_as_they_say() -> None:
    """Kills a rule that falls back to another."""
    assert trained(TWO_TURNS, FullLoss()) == "1" * 15
    assert trained(TWO_TURNS, PromptWeight(prompt_weight=0.25)) == "++.+.11.+.11111"
    assert trained(TWO_TURNS, KindWeights(weights={"reasoning": 1.0, "stop": 2.0})) == "......+...11..+"


#                 s u s m r m a a e s u s a e s u s m r m e
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ResponseLoss(), "...111111...11...1111"),
        (InstructionModelling(), ".1.111111.1.11.1.1111"),
        (FullLoss(), "1" * 21),
        (LastResponse(), ".................1111"),
        (PromptWeight(prompt_weight=0.5), ".+.111111.+.11.+.1111"),
        (KindWeights(weights={"assistant": 1.0, "scaffold": 0.5}), "+.+1.111.+.+1.+.+1.1."),
        (KindWeights(weights={"reasoning": 1.0, "scaffold": 0.5}), "+.+.1....+.+..+.+.1.."),
    ],
)
def test_marks_weigh_what_answers_weigh(rule: LossRule, expected: str) -> None:
    """Kills marks left to the scaffold (a model that never writes `</think>`), and prompts' scaffold taken for marks."""
    assert trained(MARKED, rule) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ResponseLoss(turns="last"), ".................1111"),
        (InstructionModelling(turns="last"), ".1........1....1.1111"),
        (PromptWeight(prompt_weight=0.5, turns="last"), ".+........+....+.1111"),
        (KindWeights(weights={"assistant": 1.0, "user": 1.0, "scaffold": 0.5}, turns="last"), "+1+......+1+..+1+1.1."),
    ],
)
def test_turns_last_silences_earlier_answers_and_no_prompt(rule: LossRule, expected: str) -> None:
    """Kills `last` that takes the user's weight away too, and marks of earlier turns that stay."""
    assert trained(MARKED, rule) == expected


def test_turns_last_of_response_is_last_response() -> None:
    """Kills two rules of one meaning drifting apart."""
    for rendered in (TWO_TURNS, MARKED, example("su sae su")):
        assert trained(rendered, ResponseLoss(turns="last")) == trained(rendered, LastResponse())


@pytest.mark.parametrize(
    "rule", [ResponseLoss(), InstructionModelling(), FullLoss(), LastResponse(), PromptWeight(prompt_weight=0.0)]
)
def test_every_rule_trains_the_stop_token(rule: LossRule) -> None:
    """Kills the cut stop token, after which a model never ends."""
    assert trained(TWO_TURNS, rule)[-1] == "1"


def test_a_learn_weight_multiplies_its_turn_only() -> None:
    """Kills turn weights that leak to the neighbours, or to tokens of no turn."""
    rendered = example("su sae su sae", turn_weights=[1, 0, 1, 0.5])
    assert weigh_tokens(rendered.kinds, turns=rendered.turns, turn_weights=rendered.turn_weights).tolist() == (
        [0, 0, 0, 0, 0, 0, 0, 0, 0.5, 0.5]
    )
    outside = np.full(3, -1, np.int16)
    weights = weigh_tokens(np.full(3, Kind.STOP, np.uint8), turns=outside, turn_weights=np.zeros(1, np.float32))
    assert weights.tolist() == [1, 1, 1]


layouts = st.lists(st.text("".join(LAYOUT), min_size=1, max_size=5), min_size=1, max_size=4)


@st.composite
def examples(draw: st.DrawFn) -> Rendered:
    layout = draw(layouts)
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(layout), max_size=len(layout)))
    return example(" ".join(layout), turn_weights=weights)


@given(st.lists(examples(), min_size=1, max_size=5), st.sampled_from(RULES), st.sampled_from([1.0, 0.5, 0.0]))
def test_many_documents_at_once_equal_each_alone(documents: list[Rendered], rule: LossRule, multiplier: float) -> None:
    """Kills offsets that are one off, and turns counted across documents."""
    tokens = InMemory(documents)
    starts = {"offsets": tokens.offsets, "turn_offsets": tokens.turn_offsets}
    flat = weigh_tokens(tokens.kinds, loss=rule, turns=tokens.turns, turn_weights=tokens.turn_weights, **starts)
    total, supervised = weigh_examples(tokens, loss=rule, multiplier=multiplier)
    for i, document in enumerate(documents):
        weights = plainly(document, rule)
        assert flat[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == weights.tolist()
        _, targets, target_weights = shift_targets(document.ids, weights * np.float32(multiplier))
        assert total[i] == pytest.approx(target_weights.sum(dtype=np.float64), rel=1e-12)
        assert supervised[i] == (target_weights > 0).sum()
        assert (target_weights[targets == NO_TARGET] == 0).all()


def plainly(rendered: Rendered, rule: LossRule) -> np.ndarray:
    """The weights token by token, as one would write them down."""
    answers = {Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, Kind.STOP}
    answered = [turn for kind, turn in zip(rendered.kinds, rendered.turns, strict=True) if kind in answers]
    out = []
    for kind, turn in zip(rendered.kinds, rendered.turns, strict=True):
        is_mark = kind == Kind.SCAFFOLD and turn >= 0
        own = kind in answers or is_mark
        match rule:
            case ResponseLoss() | LastResponse():
                weight = float(own)
            case InstructionModelling():
                weight = float(own or kind == Kind.USER)
            case FullLoss():
                weight = 1.0
            case PromptWeight():
                weight = rule.prompt_weight if kind in (Kind.USER, Kind.SYSTEM) else float(own)
            case KindWeights():
                name = Kind(Kind.ASSISTANT if is_mark else kind).name.lower()
                weight = {str(key): value for key, value in rule.weights.items()}.get(name, 0.0)
        last_only = isinstance(rule, LastResponse) or getattr(rule, "turns", "all") == "last"
        if last_only and own and turn != max(answered, default=-2):
            weight = 0.0
        out.append(weight * (rendered.turn_weights[turn] if turn >= 0 else 1.0))
    return np.array(out, np.float32)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_the_shift_of_documents_end_to_end_is_that_of_each_alone(lengths: list[int]) -> None:
    """Kills the shift after packing, empty documents included."""
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(100, 100 + offsets[-1], dtype=np.int32)
    weights = np.linspace(1, 2, offsets[-1]).astype(np.float32)
    together = shift_targets(ids, weights, offsets=offsets)
    for a, b in itertools.pairwise(offsets.tolist()):
        alone = ids[a:b], np.append(ids[a + 1 : b], [NO_TARGET] * (b > a)), np.append(weights[a + 1 : b], [0] * (b > a))
        for whole, part in zip(together, alone, strict=True):
            assert whole[a:b].tolist() == part.tolist()
