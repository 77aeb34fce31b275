"""Online mixing: totals and caps kept whatever the losses say, shares as the rule says, a state that goes on exactly."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.plan.online import OnlineMixer, OnlineRule

NAMES = ("chat", "code", "maths")


def rule(**changes: object) -> OnlineRule:
    given: dict[str, object] = {
        "shares": {"a": 0.5, "b": 0.5},
        "means": {"a": 1.0, "b": 1.0},
        "caps": {},
        "total": 400,
        "window": 100,
        "step_size": 1.0,
        "floor": 0.0,
    }
    return OnlineRule(**(given | changes))  # type: ignore[arg-type]


@st.composite
def rules(draw: st.DrawFn) -> OnlineRule:
    weights = {name: draw(st.floats(0.05, 1)) for name in NAMES}
    total = draw(st.integers(1, 400))
    caps = {name: draw(st.integers(1, 400)) for name in draw(st.sets(st.sampled_from(NAMES)))}
    if len(caps) == len(NAMES):
        caps["chat"] += total
    return OnlineRule(
        shares={name: weight / sum(weights.values()) for name, weight in weights.items()},
        means={name: draw(st.sampled_from([1.0, 7.5, 40.0])) for name in NAMES},
        caps=caps,
        total=total,
        window=draw(st.integers(1, 150)),
        step_size=draw(st.sampled_from([0.1, 1.0, 20.0])),
        floor=draw(st.sampled_from([0.0, 0.02, 0.3])),
    )


def finished(of: OnlineRule, losses: list[dict[str, float]]) -> OnlineMixer:
    mixer = OnlineMixer(of)
    mixer.start(losses[0])
    while not mixer.is_complete:
        mixer.next_window(losses[len(mixer.windows)])
    return mixer


@settings(max_examples=40, deadline=None)
@given(rules(), st.integers(0, 100), st.data())
def test_total_windows_and_caps_are_exact_whatever_the_losses(of: OnlineRule, seed: int, data: st.DataObject) -> None:
    """Kills a mixture that runs over a cap, ends early or late, or lets a window be longer than its steps."""
    few = data.draw(st.lists(st.dictionaries(st.sampled_from(NAMES), st.floats(0, 30)), min_size=1, max_size=5))
    mixer = finished(of, [few[i % len(few)] for i in range(of.num_windows + 1)])
    sums = [sum(window.counts.values()) for window in mixer.windows]
    assert sums[:-1] == [of.window] * (len(sums) - 1)
    assert sum(sums) == of.total
    assert all(mixer.drawn[name] <= cap for name, cap in of.caps.items())
    for window in mixer.windows:
        assert sum(window.shares.values()) == pytest.approx(1)
        assert min(window.shares.values()) >= of.floor - 1e-12 or window is mixer.windows[0]


@settings(max_examples=30, deadline=None)
@given(rules(), st.integers(0, 400), st.data())
def test_a_mixer_that_goes_on_from_its_state_is_the_same_mixer(of: OnlineRule, stop: int, data: st.DataObject) -> None:
    """Kills state that a checkpoint leaves out, and numbers that JSON does not bring back."""
    few = data.draw(st.lists(st.dictionaries(st.sampled_from(NAMES), st.floats(0, 30)), min_size=1, max_size=5))
    losses = [few[i % len(few)] for i in range(of.num_windows + 1)]
    whole = finished(of, losses)
    mixer = OnlineMixer(of)
    mixer.start(losses[0])
    while not mixer.is_complete:
        if len(mixer.windows) == stop % of.num_windows + 1:
            mixer = OnlineMixer.from_state(of, json.loads(json.dumps(mixer.state())))
        mixer.next_window(losses[len(mixer.windows)])
    assert mixer.windows == whole.windows


@settings(max_examples=30, deadline=None)
@given(rules())
def test_without_losses_every_prefix_of_windows_keeps_the_shares(of: OnlineRule) -> None:
    """Kills rounding that adds up from window to window: after any number of them each task is within two of its share."""
    of = OnlineRule(**(of.as_json() | {"caps": {}, "floor": 0.0}))
    mixer = finished(of, [{}] * (of.num_windows + 1))
    in_examples = {name: of.shares[name] / of.means[name] for name in NAMES}
    for number in range(1, len(mixer.windows) + 1):
        drawn = mixer.drawn_before(number)
        for name in NAMES:
            due = sum(drawn.values()) * in_examples[name] / sum(in_examples.values())
            assert abs(drawn[name] - due) < 2


def test_shares_worked_by_hand() -> None:
    """Kills a step in the wrong direction, a floor that takes more than it gives, and excess over the wrong reference.

    b is log 3 behind a in what it gained: 1 : 3. With a floor of 0.1 each, 0.8 is shared out: 0.3 and 0.7.
    """
    mixer = OnlineMixer(rule(floor=0.1))
    mixer.start({"a": 5.0, "b": 2.0})
    window = mixer.next_window({"a": 5.0 - math.log(3), "b": 2.0})
    assert window.shares == pytest.approx({"a": 0.3, "b": 0.7})
    assert window.excess == pytest.approx({"a": -math.log(3), "b": 0.0})
    assert window.counts == {"a": 30, "b": 70}
    again = mixer.next_window({"a": 5.0 - math.log(3), "b": 2.0})
    assert again.shares == pytest.approx({"a": 0.8 * 0.3 / 2.4 + 0.1, "b": 0.8 * 2.1 / 2.4 + 0.1})


def test_a_given_reference_counts_only_what_is_above_it() -> None:
    """Kills a task that is better than its reference and still loses share to nobody's gain: 0, not -2."""
    mixer = OnlineMixer(rule(reference={"a": 3.0, "b": 1.0}))
    mixer.start({"a": 9.0, "b": 9.0})
    assert mixer.next_window({"a": 1.0, "b": 1.0}).shares == pytest.approx({"a": 0.5, "b": 0.5})
    assert mixer.next_window({"a": 1.0, "b": 1.0 + math.log(4)}).shares == pytest.approx({"a": 0.2, "b": 0.8})


def test_a_task_that_is_not_measured_moves_with_the_others() -> None:
    """Kills unmeasured tasks that starve because all others have a positive excess."""
    mixer = OnlineMixer(rule(shares={"a": 0.4, "b": 0.4, "c": 0.2}, means={"a": 1.0, "b": 1.0, "c": 1.0}))
    mixer.start({"a": 1.0, "b": 1.0})
    shares = mixer.next_window({"a": 3.0, "b": 3.0, "c": math.nan}).shares
    assert shares == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})


def test_a_task_that_is_used_up_gives_its_place_to_the_others() -> None:
    """Kills caps that hold per window: a has 70 in all, 50 go in the first window and 20 are left for the second."""
    mixer = OnlineMixer(rule(caps={"a": 70}, total=300))
    assert [mixer.windows[0].counts["a"], mixer.next_window({}).counts["a"], mixer.next_window({}).counts["a"]] == [50, 20, 0]
    assert mixer.drawn == {"a": 70, "b": 230}
