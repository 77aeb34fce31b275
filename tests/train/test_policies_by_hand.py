"""Five loss rules over one rendering of twelve tokens: weights written out by hand, gradients by p - onehot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from toy import IM_END, save_tiny, tiny_llama
from tutelage import Batches, make_plan, render_conversations
from tutelage.plan.spec import BatchSpec, FullLoss, InstructionModelling, LastResponse, LossRule, PromptWeight, ResponseLoss
from tutelage.plan.weights import weigh_tokens
from tutelage.records import Conversation, Kind, Origin, Rendered, Turn
from tutelage.train.step import step_gradients

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)
#             uabacEudaefE   (u, a before a turn: scaffold; E: the stop token)
KINDS = list("suusaesusaae")
TENTH = float(np.float32(0.1))  # weights are float32
BY_HAND: list[tuple[LossRule, list[float]]] = [
    # The weight of a token is that of the place before it, which predicts it: the first token is never a target.
    (ResponseLoss(), [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]),
    (InstructionModelling(), [0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1]),
    (PromptWeight(prompt_weight=0.1), [0, TENTH, TENTH, 0, 1, 1, 0, TENTH, 0, 1, 1, 1]),
    (LastResponse(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
    (FullLoss(), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
]
NAMES = [rule.kind for rule, _ in BY_HAND]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The conversation, rendered once for all rules."""
    said = [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "ef")]
    talk = Conversation(Origin("s", "f.jsonl", 1), tuple(Turn(*turn) for turn in said), "task", "MIT", "human")
    (made,) = render_conversations([talk], tokenizer=save_tiny(tmp_path_factory.mktemp("toy")), template=TEMPLATE)
    assert isinstance(made, Rendered)
    return made


def test_the_twelve_tokens_are_what_they_are_said_to_be(rendered: Rendered) -> None:
    """Kills a rendering that already knows a rule."""
    letters = {Kind.SCAFFOLD: "s", Kind.USER: "u", Kind.ASSISTANT: "a", Kind.STOP: "e"}
    assert [letters[Kind(k)] for k in rendered.kinds.tolist()] == KINDS
    assert rendered.ids.tolist() == [IM_END if c == "E" else ord(c) for c in "uabacEudaefE"]


@pytest.mark.parametrize(("rule", "by_hand"), BY_HAND, ids=NAMES)
def test_weights_and_gradient_by_hand(rendered: Rendered, rule: LossRule, by_hand: list[float]) -> None:
    """Kills a rule that trains other tokens, a shift by one or two, a division by the number of tokens, flipped polarity."""
    weights = weigh_tokens(rendered.kinds, loss=rule, turns=rendered.turns, turn_weights=rendered.turn_weights)
    assert weights.tolist() == pytest.approx(by_hand)
    total = sum(by_hand[1:])
    plan = make_plan(["task"], [12], weights=[total], batch=BatchSpec(slots_per_step=16, capacity=16))
    batch = Batches.of(plan, [rendered], loss=rule)[0]
    assert batch.total_weight == pytest.approx(total)
    assert batch.weights[0].tolist() == pytest.approx([*by_hand[1:], 0, 0, 0, 0, 0])

    model = tiny_llama(tied=False)
    flat, nll = step_gradients(model, batch)
    hidden, p = _forward(model, rendered)
    targets = rendered.ids[1:]
    assert float((flat.weights * nll).sum()) / total == pytest.approx(
        -sum(w * np.log(p[i, t]) for i, (w, t) in enumerate(zip(by_hand[1:], targets, strict=True))) / total, rel=1e-6
    )
    # dL / d logits of place i = w_i / W * (p_i - onehot_i), and the head's gradient is the sum of its products with h_i.
    slopes = np.array(by_hand[1:])[:, None] / total * (p[:11] - np.eye(p.shape[1])[targets])
    np.testing.assert_allclose(model.lm_head.weight.grad.numpy(), slopes.T @ hidden[:11], rtol=1e-6, atol=1e-12)
    assert _through_the_decoder(rendered, slopes) == pytest.approx(_norm(model.model), rel=1e-6)


def _forward(model: Any, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """(12, 32) last hidden states and (12, 131) probabilities, by transformers' own forward."""
    with torch.no_grad():
        out = model(torch.from_numpy(rendered.ids.astype(np.int64))[None], output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0].numpy(), out.logits[0].softmax(-1).numpy()


def _through_the_decoder(rendered: Rendered, slopes: np.ndarray) -> float:
    """The norm of the decoder's gradient when these are the slopes of its logits."""
    model = tiny_llama(tied=False)
    logits = model(torch.from_numpy(rendered.ids.astype(np.int64))[None], use_cache=False).logits[0]
    logits[:11].backward(torch.from_numpy(slopes))
    return _norm(model.model)


def _norm(decoder: Any) -> float:
    return float(sum(p.grad.pow(2).sum() for p in decoder.parameters())) ** 0.5
