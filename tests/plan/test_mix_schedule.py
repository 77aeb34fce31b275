"""Schedules: totals and caps of the whole run, rates of each part of it, one order over all of them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.plan.assemble import make_plan
from tutelage.plan.mixtures import plan_mixture
from tutelage.plan.order import Order
from tutelage.plan.rates import Mixture, Supply, plan_counts
from tutelage.plan.spec import BatchSpec, MixSpec

NAMES = ("chat", "code", "maths", "qa")


def mix(schedule: dict[str, Any] | None, **more: Any) -> MixSpec:
    return MixSpec.model_validate({"schedule": schedule, **more} if schedule else more)


def explicit(**weights: float) -> dict[str, Any]:
    return {"kind": "explicit", "weights": weights}


def supply(num: int, length: int = 10, supervised: int = 4) -> Supply:
    return Supply(num, num * length, num * supervised)


@st.composite
def supplies(draw: st.DrawFn) -> dict[str, Supply]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, unique=True))
    return {name: supply(draw(st.integers(5, 400)), draw(st.integers(2, 30)), draw(st.integers(1, 2))) for name in names}


@st.composite
def schedules(draw: st.DrawFn, names: tuple[str, ...]) -> dict[str, Any]:
    def rates(*, full: bool = True) -> Any:
        simple = st.sampled_from(["equal", "proportional", {"temperature": 3.0}])
        weights = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0] if full else [0.0, 1.0, 3.0]) for name in names})
        found = draw(st.one_of(simple, weights))
        assume(not isinstance(found, dict) or "temperature" in found or any(found.values()))
        return explicit(**found) if isinstance(found, dict) and "temperature" not in found else found

    match draw(st.sampled_from(["interpolate", "stages", "two_stage"])):
        case "interpolate":
            start, end = sorted(draw(st.lists(st.sampled_from([0.0, 0.1, 0.45, 0.7, 1.0]), min_size=2, max_size=2, unique=True)))
            shape = draw(st.sampled_from(["linear", "cosine"]))
            return {"kind": "interpolate", "from": rates(full=False), "to": rates(), "shape": shape, "start": start, "end": end}
        case "stages":
            shares = draw(st.sampled_from([(1.0,), (0.6, 0.4), (0.25, 0.5, 0.25)]))
            return {"kind": "stages", "stages": [{"share": share, "rates": rates(full=False)} for share in shares]}
        case _:
            first = draw(st.sets(st.sampled_from(names), min_size=1, max_size=len(names) - 1))
            return {
                "kind": "two_stage",
                "first": sorted(first),
                "replay": draw(st.sampled_from([0.0, 0.1, 1.0])),
                "rates": rates(),
            }


@settings(max_examples=60, deadline=None)
@given(supplies(), st.data())
def test_totals_and_caps_hold_over_the_whole_run(have: dict[str, Supply], data: st.DataObject) -> None:
    """Kills caps per stage instead of per run, totals that rounding in stretches moves, and a refill that loses budget."""
    schedule = data.draw(schedules(tuple(have)))
    visits, total = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 900))
    try:
        got = plan_mixture(have, mix(schedule, total_examples=total, max_visits=visits))
    except PlanError as error:
        largest = int("".join(re.findall(r"(?: is|at most) ([\d,]+);", str(error))[:1]).replace(",", "") or 0)
        assume(largest)
        assert largest < total
        got, total = plan_mixture(have, mix(schedule, total_examples=largest, max_visits=visits)), largest
    assert sum(got.counts.values()) == total
    assert all(count <= visits * have[name].num_examples for name, count in got.counts.items())
    assert got.timetable is not None
    assert Counter(_summed(got)) == Counter({name: n for name, n in got.counts.items() if n})


def _summed(got: Mixture) -> dict[str, int]:
    assert got.timetable is not None
    sums: Counter[str] = Counter()
    for stretch in got.timetable.stretches:
        sums.update({name: n for name, n in stretch.items() if n})
    return dict(sums)


@settings(max_examples=40, deadline=None)
@given(supplies(), st.data())
def test_a_scheduled_order_keeps_passes_and_shows_any_window(have: dict[str, Supply], data: st.DataObject) -> None:
    """Kills passes that begin anew at the border of a stage, and windows that need what stands before them."""
    schedule = data.draw(schedules(tuple(have)))
    got = plan_mixture(have, mix(schedule, total_examples=data.draw(st.integers(10, 600))))
    assert got.timetable is not None
    sizes = {name: s.num_examples for name, s in have.items()}
    order = Order(got.counts, sizes=sizes, stretches=got.timetable.stretches, seed=3)
    draws = order.window(0, len(order))
    for i, name in enumerate(order.tasks):
        visit, index = draws.visit[draws.task == i], draws.index[draws.task == i]
        assert visit.tolist() == [n // sizes[name] for n in range(got.counts[name])]
        alone = Order({name: got.counts[name]}, sizes=sizes, seed=3).window(0, got.counts[name])
        assert index.tolist() == alone.index.tolist()
        visits = np.bincount(index, minlength=sizes[name])
        assert visits.max() - visits.min() <= 1
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    part = order.window(start, stop)
    for field in ("task", "visit", "index"):
        assert getattr(part, field).tolist() == getattr(draws, field)[start:stop].tolist()


@settings(max_examples=40, deadline=None)
@given(supplies(), st.data())
def test_every_prefix_follows_the_schedule_itself(have: dict[str, Supply], data: st.DataObject) -> None:
    """Kills a schedule read at the wrong point of the run. Rates are summed up position by position, the slow way.

    Three for the rounding and the interleaving, one for the total being whole, and what a hundredth of the change bends.
    """
    schedule = data.draw(schedules(tuple(have)))
    total = data.draw(st.integers(10, 500))
    got = plan_mixture(have, mix(schedule, total_examples=total))
    assert got.timetable is not None
    sizes = {name: s.num_examples for name, s in have.items()}
    order = Order(got.counts, sizes=sizes, stretches=got.timetable.stretches)
    task = order.window(0, total).task
    due = np.cumsum([_rates_at((i + 0.5) / total, schedule, sizes) for i in range(total)], axis=0)
    for i, name in enumerate(order.tasks):
        seen = np.cumsum(task == i)
        assert np.abs(seen - due[:, list(sizes).index(name)]).max() < 4 + total / 10_000 + 0.5


def _rates_at(progress: float, schedule: dict[str, Any], sizes: dict[str, int]) -> list[float]:
    def shares(rates: Any) -> list[float]:
        if rates == "equal":
            weights = [1.0] * len(sizes)
        elif rates == "proportional":
            weights = [float(n) for n in sizes.values()]
        elif "temperature" in rates:
            weights = [n ** (1 / rates["temperature"]) for n in sizes.values()]
        else:
            weights = [rates["weights"][name] for name in sizes]
        return [weight / sum(weights) for weight in weights]

    match schedule["kind"]:
        case "interpolate":
            x = min(max((progress - schedule["start"]) / (schedule["end"] - schedule["start"]), 0.0), 1.0)
            part = x if schedule["shape"] == "linear" else (1 - math.cos(math.pi * x)) / 2
            pairs = zip(shares(schedule["from"]), shares(schedule["to"]), strict=True)
            return [(1 - part) * a + part * b for a, b in pairs]
        case "stages":
            ends = list(itertools.accumulate(stage["share"] for stage in schedule["stages"]))
            number = next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)
            return shares(schedule["stages"][number]["rates"])
        case _:
            q, k = dict(zip(sizes, shares(schedule["rates"]), strict=True)), schedule["replay"]
            special = sum(q[name] for name in schedule["first"])
            if progress < special / (1 + k * special):
                return [q[name] / special if name in schedule["first"] else 0.0 for name in sizes]
            general = 1 - special + k * special
            return [(k if name in schedule["first"] else 1.0) * q[name] / general for name in sizes]


@settings(max_examples=40, deadline=None)
@given(supplies(), st.randoms(), st.data())
def test_order_of_tasks_and_tasks_without_a_share_change_nothing(
    have: dict[str, Supply], random: Any, data: st.DataObject
) -> None:
    """Kills timetables that know tasks by their number."""
    weights = {name: 1.0 + i for i, name in enumerate(have)}
    schedule = {
        "stages": [
            {"share": 0.3, "rates": explicit(**weights)},
            {"share": 0.7, "rates": explicit(**dict(list(weights.items())[:1]))},
        ]
    }
    total = data.draw(st.integers(3, 300))
    first = plan_mixture(have, mix(schedule, total_examples=total))
    shuffled = list(have.items())
    random.shuffle(shuffled)
    second = plan_mixture({"aside": supply(9), **dict(shuffled)}, mix(schedule, total_examples=total))
    assert second.counts == first.counts | {"aside": 0}
    assert first.timetable is not None and second.timetable is not None
    assert first.timetable.stretches == second.timetable.stretches


@given(supplies(), st.integers(1, 700), st.sampled_from(["equal", "proportional", {"temperature": 2.0}]))
def test_one_stage_for_all_is_the_run_without_a_schedule(have: dict[str, Supply], total: int, rates: Any) -> None:
    """Kills a schedule with rounding or an order of its own: one stage must give the counts and the order of plain rates."""
    plain = plan_counts(have, mix(None, rates=rates, total_examples=total, count="tokens"))
    staged = plan_mixture(have, mix({"stages": [{"share": 1.0, "rates": rates}]}, total_examples=total, count="tokens"))
    assert staged.counts == plain.counts
    sizes = {name: s.num_examples for name, s in have.items()}
    assert staged.timetable is not None
    a, b = (
        Order(m.counts, sizes=sizes, stretches=m.timetable.stretches if m.timetable else ()).window(0, total)
        for m in (plain, staged)
    )
    assert a.task.tolist() == b.task.tolist() and a.index.tolist() == b.index.tolist()


def test_dmt_worked_by_hand() -> None:
    """Kills a replay counted in the general tasks' records, and one that is taken from the first stage.

    DMT (arXiv 2310.05492) trains GSM8K RFT (110,142) and Code Alpaca (20,022), then ShareGPT (86,060) with 1/256 of the
    specialised data, which is 0.0039 x 130,164 = 507.6 records: 429.6 of GSM8K RFT and 78.1 of Code Alpaca.
    """
    have = {"maths": supply(110_142), "code": supply(20_022), "chat": supply(86_060)}
    schedule = {"kind": "two_stage", "first": ["maths", "code"], "replay": 0.0039}
    got = plan_mixture(have, mix(schedule))
    assert got.timetable is not None
    assert got.timetable.stretches == (
        {"chat": 0, "code": 20_022, "maths": 110_142},
        {"chat": 86_060, "code": 78, "maths": 430},
    )
    assert "mix.schedule.replay: 86,568 examples: chat 86,060, code 78, maths 430" in got.notes
    half = plan_mixture(have, mix(schedule, total_examples=108_366))
    assert sum(half.counts.values()) == 108_366
    assert abs(half.counts["chat"] - 86_060 * 108_366 / 216_731.64) < 1


def test_interpolation_worked_by_hand() -> None:
    """Kills a line that starts at 0 instead of `start`, or a cosine that is a line; a runs from all to nothing.

    A thousand examples from b alone to a alone. On a line a has 125 of the first 500; between 0.2 and 0.6 it has none before
    200, 25 of the 100 up to 300 (a quarter of the way is 1/4 x 1/2 of a hundred: 12.5) and all from 600 on. On half a cosine
    of the whole run the first quarter holds 1000 x (1/8 - sin(pi / 4) / (2 pi)) = 12.5.
    """
    have = {"a": supply(1000), "b": supply(1000)}

    def seen(num: int, **more: Any) -> int:
        schedule = {"kind": "interpolate", "from": explicit(b=1), "to": explicit(a=1), **more}
        got = plan_mixture(have, mix(schedule, total_examples=1000))
        assert got.timetable is not None
        order = Order(got.counts, sizes={"a": 1000, "b": 1000}, stretches=got.timetable.stretches)
        return int((order.window(0, num).task == 0).sum())

    assert abs(seen(500) - 125) <= 1 and abs(seen(1000) - 500) == 0
    middle = {"start": 0.2, "end": 0.6}
    assert [abs(seen(n, **middle) - due) <= 1 for n, due in ((200, 0), (300, 12.5), (400, 50), (600, 200), (1000, 600))] == [
        True
    ] * 5
    assert seen(200, **middle) == 0
    assert abs(seen(250, shape="cosine") - 12.5) <= 1.5
    assert abs(seen(500, shape="cosine") - 1000 * (0.25 - 1 / (2 * math.pi))) <= 1.5


def test_rates_of_tokens_hold_in_tokens_in_every_stage() -> None:
    """Kills a schedule that counts examples whatever `count` says: b's examples are three times as long."""
    have = {"a": supply(1000, length=10), "b": supply(1000, length=30)}
    schedule = {"stages": [{"share": 0.5, "rates": "equal"}, {"share": 0.5, "rates": explicit(a=1, b=3)}]}
    got = plan_mixture(have, mix(schedule, total_tokens=24_000, count="tokens"))
    assert got.timetable is not None
    assert got.timetable.stretches == ({"a": 600, "b": 200}, {"a": 300, "b": 300})
    assert got.timetable.promised(0.5, 1.0) == pytest.approx({"a": 0.25, "b": 0.75})


def test_a_cap_thins_a_task_in_all_its_stages_and_the_rest_goes_to_their_other_tasks() -> None:
    """Kills a cap that bites in the last stage only, and budget that leaks from one stage into another.

    Both stages want 300 maths; maths holds 400 in two visits, so each gets 200. Its 100 go to qa in the first, to chat in the
    second.
    """
    have = {"maths": supply(200), "qa": supply(5000), "chat": supply(5000)}
    stages = [{"share": 0.5, "rates": explicit(maths=3, qa=2)}, {"share": 0.5, "rates": explicit(maths=3, chat=2)}]
    got = plan_mixture(have, mix({"stages": stages}, total_examples=1000, max_visits={"maths": 2}))
    assert got.timetable is not None
    assert got.timetable.stretches == ({"chat": 0, "maths": 200, "qa": 300}, {"chat": 300, "maths": 200, "qa": 0})
    assert any("refilled" in note and "chat 200 -> 300" in note for note in got.notes)


def test_a_cap_leaves_stages_as_long_as_they_were_promised() -> None:
    """Kills refill by the weights of the whole run, which would shorten the stage where the capped task was strong.

    Stage 1 of 400 wants 240 maths, stage 2 of 600 wants 300; maths holds 400. With factor a on maths in both,
    400 x 240 a / (240 a + 160) + 600 a / (a + 1) = 400 at a = 0.565: 183 and 217.
    """
    have = {"maths": supply(200), "qa": supply(5000), "chat": supply(5000)}
    stages = [{"share": 0.4, "rates": explicit(maths=3, qa=2)}, {"share": 0.6, "rates": explicit(maths=1, chat=1)}]
    got = plan_mixture(have, mix({"stages": stages}, total_examples=1000, max_visits={"maths": 2}))
    assert got.timetable is not None
    assert got.timetable.stretches == ({"chat": 0, "maths": 183, "qa": 217}, {"chat": 383, "maths": 217, "qa": 0})


def test_without_refill_a_cap_shortens_the_run() -> None:
    """Kills a run that says it is shorter and is not: 600 maths wanted, 400 there, 200 stay unused."""
    have = {"maths": supply(200), "qa": supply(5000)}
    stages = [{"share": 0.5, "rates": explicit(maths=3, qa=2)}] * 2
    got = plan_mixture(have, mix({"stages": stages}, total_examples=1000, max_visits=2, refill="none"))
    assert got.counts == {"maths": 400, "qa": 400} and got.num_unfilled == 200
    assert got.timetable is not None and got.timetable.stretches == ({"maths": 200, "qa": 200},) * 2


def test_minima_are_met_where_the_task_has_a_share() -> None:
    """Kills minima that a schedule forgets: rare would have 10 of the second stage's 500, and is owed 50."""
    have = {"rare": supply(60), "qa": supply(5000)}
    stages = [{"share": 0.5, "rates": explicit(qa=1)}, {"share": 0.5, "rates": explicit(qa=49, rare=1)}]
    got = plan_mixture(have, mix({"stages": stages}, total_examples=1000, min_examples={"rare": 50}))
    assert got.timetable is not None
    assert got.timetable.stretches == ({"qa": 500, "rare": 0}, {"qa": 450, "rare": 50})


def test_a_stage_that_caps_cannot_fill_is_named_with_the_largest_budget_that_can() -> None:
    """Kills a late surprise, and a number that is not accepted when it is asked for."""
    have = {"maths": supply(100), "code": supply(50), "qa": supply(5000)}
    stages = [{"share": 0.4, "rates": explicit(maths=1, code=1)}, {"share": 0.6, "rates": "proportional"}]
    with pytest.raises(
        PlanError, match=r"mix\.schedule\.stages\.0: 400 examples .* \(code, maths\) hold 300;.* is 750; ask"
    ) as told:
        plan_mixture(have, mix({"stages": stages}, total_examples=1000, max_visits=2))
    assert "max_visits 2" in str(told.value)
    got = plan_mixture(have, mix({"stages": stages}, total_examples=750, max_visits=2))
    assert got.timetable is not None and got.timetable.stretches[0] == {"code": 100, "maths": 200, "qa": 0}
    with pytest.raises(PlanError, match=r"stages\.0"):
        plan_mixture(have, mix({"stages": stages}, total_examples=751, max_visits=2))


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ({"two_stage": {"first": ["mathe"], "replay": 0.1}}, r"mix\.schedule\.first\.0: no task `mathe`; did you mean `maths`"),
        ({"two_stage": {"first": ["maths", "qa"], "replay": 0.1}}, r"mix\.schedule\.first: names every task"),
        (
            {"two_stage": {"first": ["maths"], "replay": 0.1, "rates": explicit(qa=1)}},
            r"mix\.schedule\.first\.0: task `maths` has no share in mix\.schedule\.rates",
        ),
        (
            {"interpolate": {"from": "equal", "to": explicit(math=1)}},
            r"mix\.schedule\.to\.weights\.math: no such task; did you mean `maths`",
        ),
        (
            {"stages": [{"share": 1.0, "rates": explicit(mats=1)}]},
            r"mix\.schedule\.stages\.0\.rates\.weights\.mats: no such task; did you mean `maths`",
        ),
    ],
)
def test_what_cannot_be_is_said_of_its_place_in_the_schedule(schedule: dict[str, Any], complaint: str) -> None:
    """Kills errors that point at `mix.rates`, which the recipe does not have."""
    with pytest.raises(PlanError, match=complaint):
        plan_mixture({"maths": supply(10), "qa": supply(20)}, mix(schedule))


def test_rates_over_sources_speak_of_sources() -> None:
    """Kills messages that look for a task where the recipe names sources."""
    schedule = {"two_stage": {"first": ["gsm"], "replay": 0.1}}
    with pytest.raises(PlanError, match=r"mix\.schedule\.first\.0: no source `gsm`; did you mean `gsm8k`"):
        plan_mixture({"gsm8k": supply(10), "chat": supply(20)}, mix(schedule, over="sources"))


def test_a_task_without_records_is_not_scheduled() -> None:
    """Kills a division by zero where a message is due."""
    with pytest.raises(PlanError, match=r"mix\.schedule: task `maths` has a share but no training record"):
        plan_mixture({"maths": Supply(0, 0, 0), "qa": supply(9)}, mix({"interpolate": {"from": "equal", "to": "proportional"}}))


@pytest.mark.parametrize("pack", ["best_fit", "none"])
@pytest.mark.parametrize("size", [{"slots_per_step": 64}, {"examples_per_step": 8}])
def test_packing_keeps_the_stages_apart(pack: Literal["best_fit", "none"], size: dict[str, int]) -> None:
    """Kills windows of a hundred steps that shuffle a short run's stages into one another."""
    tasks = ["first"] * 150 + ["then"] * 250
    lengths = [3 + i * 7 % 13 for i in range(400)]
    two = {"two_stage": {"first": ["first"], "replay": 0.0}}
    plan = make_plan(tasks, lengths, mix=mix(two), batch=BatchSpec(capacity=32, pack=pack, **size))
    step = np.repeat(np.arange(len(plan.steps)), plan.steps.num_rows)[plan.placements.row]
    is_first = plan.placements.example < 150
    begins = step[~is_first].min()
    late = np.flatnonzero(is_first & (step > begins))
    assert len(plan.placements.row) == 400
    assert len(late) == 0 if pack == "best_fit" else len(late) <= 8


def test_a_gradual_change_is_followed_inside_a_hundred_steps() -> None:
    """Kills one window for the whole of a short run: its rows would come in any order, and the schedule would be lost."""
    tasks, lengths = ["a"] * 800 + ["b"] * 800, [4 + i * 7 % 13 for i in range(1600)]
    fade = {"interpolate": {"from": explicit(a=1), "to": explicit(b=1)}}
    plan = make_plan(tasks, lengths, mix=mix(fade, total_examples=1600), batch=BatchSpec(slots_per_step=256, capacity=64))
    assert 40 < len(plan.steps) < 100
    step = np.repeat(np.arange(len(plan.steps)), plan.steps.num_rows)[plan.placements.row]
    tenth = step * 10 // len(plan.steps)
    shares = [float((plan.placements.example[tenth == i] < 800).mean()) for i in range(10)]
    assert np.abs(np.array(shares) - (0.95 - np.arange(10) / 10)).max() < 0.06
