"""Pouring: optimal on small cases, exact in groups."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mix_strategies import NAMES, grouped
from plan_reference import water_filling

from tutelage.errors import PlanError
from tutelage.plan.pour import Vessel, amount_worth, join, pour, settle
from tutelage.plan.rates import Supply, compute_rates, plan_counts
from tutelage.plan.spec import Capped, Equal, Explicit, Group, Groups, MixSpec, Temperature


@st.composite
def full_vessels(draw: st.DrawFn) -> tuple[Vessel, dict[str, int]]:
    """Up to four names with small weights, floors and caps, and whole amounts that some whole level gives."""
    level, parts, amounts = draw(st.integers(1, 6)), [], {}
    for name in NAMES[: draw(st.integers(1, 4))]:
        weight, low = draw(st.integers(1, 3)), draw(st.integers(0, 4))
        high = draw(st.one_of(st.none(), st.integers(low, 9)))
        amounts[name] = max(low, level * weight) if high is None else min(max(low, level * weight), high)
        parts.append(Vessel(name, weight, low, high))
    return join("", 1, parts), amounts


@given(full_vessels())
def test_water_filling_beats_every_other_division_of_whole_numbers(case: tuple[Vessel, dict[str, int]]) -> None:
    """Kills any rule but the nearest to the weights: by brute force no other counts within the bounds have a smaller
    sum of count^2 / weight, the distance that proportional counts minimise.
    """
    vessel, amounts = case
    got = settle(vessel, pour(vessel, sum(amounts.values())))
    assert got == amounts
    total = sum(amounts.values())
    ranges = [range(int(part.low), 1 + int(total if part.high is None else part.high)) for part in vessel.parts]
    weights = [part.weight for part in vessel.parts]
    costs = {
        counts: sum(Fraction(c * c) / w for c, w in zip(counts, weights, strict=True))
        for head in itertools.product(*ranges[:-1])
        for counts in [(*head, total - sum(head))]
        if counts[-1] in ranges[-1]
    }
    assert min(costs, key=lambda counts: costs[counts]) == tuple(amounts[part.name] for part in vessel.parts)


@given(full_vessels(), st.lists(st.integers(1, 7), min_size=4, max_size=4), st.fractions(0, 1))
def test_an_amount_at_a_price_costs_just_the_total(
    case: tuple[Vessel, dict[str, int]], prices: list[int], part: Fraction
) -> None:
    """Kills a budget in tokens that is spent as if all examples were as long as one another."""
    vessel, amounts = case
    priced = dict(zip(NAMES, prices, strict=False))
    low, high = (
        sum(priced[name] * amount for name, amount in pour(vessel, a).items()) for a in (vessel.low, sum(amounts.values()))
    )
    total = low + part * (high - low)
    amount = amount_worth(vessel, total, priced)
    assert sum(priced[name] * got for name, got in pour(vessel, amount).items()) == total


@st.composite
def nested(draw: st.DrawFn) -> tuple[dict[str, Supply], Groups]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=6, unique=True))
    sizes = {name: draw(st.integers(1, 50)) for name in names}
    return {name: Supply(size, size * 3, size) for name, size in sizes.items()}, draw(grouped(names))


def _members(group: Group) -> set[str]:
    return set(group.members).union(*(_members(inner) for inner in group.groups.values()))


def _check_ratios(groups: dict[str, Group], total: Fraction | int, counts: dict[str, int]) -> None:
    for group in groups.values():
        here = sum(counts[name] for name in _members(group))
        assert abs(here - total * Fraction(str(group.weight)) / sum(Fraction(str(g.weight)) for g in groups.values())) < 1
        if group.groups:
            _check_ratios(group.groups, here, counts)


@given(nested(), st.integers(1, 500))
def test_groups_keep_their_ratio_to_rounding_when_no_cap_binds(case: tuple[dict[str, Supply], Groups], total: int) -> None:
    """Kills remainders settled over all names at once, which let a group of many small shares gain several examples."""
    given, rates = case
    rates = rates.model_validate(rates.model_dump() | {"groups": {n: _without_caps(g) for n, g in rates.groups.items()}})
    counts = plan_counts(given, MixSpec(rates=rates, total_examples=total)).counts
    assert sum(counts.values()) == total
    _check_ratios(rates.groups, total, counts)


def _without_caps(group: Group) -> dict[str, object]:
    written = group.model_dump(exclude={"rates"} if group.groups else None)
    if group.groups:
        return written | {"members": (), "groups": {name: _without_caps(inner) for name, inner in group.groups.items()}}
    return written | {"rates": {"kind": "equal"} if group.rates.kind == "unimax" else written["rates"]}


GROUPS = Groups(
    groups={
        "specialised": Group(weight=1.5, members=("maths", "code"), rates=Equal()),
        "general": Group(weight=1.0, members=("chat", "qa"), rates=Temperature(temperature=2.0)),
    }
)
SIZES = {"maths": 500, "code": 4_000, "chat": 1_600, "qa": 100}


def test_a_ratio_between_groups_by_hand() -> None:
    """Kills group weights taken times the group's size: 1.5 to 1 is 600 to 400, half and half, and 4 to 1 by the root."""
    counts = plan_counts({name: Supply(n, n, n) for name, n in SIZES.items()}, MixSpec(rates=GROUPS, total_examples=1000)).counts
    assert counts == {"chat": 320, "code": 300, "maths": 300, "qa": 80}
    assert compute_rates(SIZES, GROUPS) == {"maths": 0.3, "code": 0.3, "chat": 0.32, "qa": 0.08}


def test_remainders_are_settled_group_by_group() -> None:
    """Kills remainders settled over all names: five shares of 1.6 and five of 2.4 are 8 and 12, not 10 and 10."""
    names = {group: tuple(f"{group}{i}" for i in range(5)) for group in ("few", "many")}
    groups = {g: Group(weight=2.0 if g == "few" else 3.0, members=members, rates=Equal()) for g, members in names.items()}
    given = {name: Supply(9, 9, 9) for members in names.values() for name in members}
    counts = plan_counts(given, MixSpec(rates=Groups(groups=groups), total_examples=20)).counts
    assert sum(counts[name] for name in names["few"]) == 8
    assert set(counts.values()) == {1, 2, 3}


def test_what_a_cap_frees_goes_to_its_own_group_first() -> None:
    """Kills a refill over all names alike: of 5,000 maths can take 500 of 1,500, code takes the rest and 3 : 2 is kept."""
    given = {name: Supply(n, n, n) for name, n in SIZES.items()} | {"qa": Supply(1_000, 1_000, 1_000)}
    mix = MixSpec(rates=GROUPS, total_examples=5_000, max_visits={"maths": 1, "code": 1})
    counts = plan_counts(given, mix).counts
    assert (counts["maths"], counts["code"], counts["chat"] + counts["qa"]) == (500, 2_500, 2_000)
    full = plan_counts(given, mix.model_copy(update={"total_examples": 10_000}))
    assert (full.counts["maths"], full.counts["code"], full.counts["chat"] + full.counts["qa"]) == (500, 4_000, 5_500)
    assert any("group specialised holds no more than 4,500 of its 6,000 examples" in note for note in full.notes)


@given(nested(), st.data())
def test_nested_refill_is_water_filling_of_water_fillings(case: tuple[dict[str, Supply], Groups], data: st.DataObject) -> None:
    """Kills freed budget that leaves a group which could still hold it."""
    given, rates = case
    rates = Groups(
        groups={name: g for name, g in rates.groups.items() if g.members} or {"all": Group(members=tuple(given))}, rest="drop"
    )
    rates = rates.model_copy(update={"groups": {n: g.model_copy(update={"rates": Equal()}) for n, g in rates.groups.items()}})
    visits = data.draw(st.integers(1, 3))
    caps = {name: visits * given[name].num_examples for group in rates.groups.values() for name in group.members}
    total = data.draw(st.integers(1, sum(caps.values())))
    counts = plan_counts(given, MixSpec(rates=rates, total_examples=total, max_visits=visits)).counts
    held = {name: sum(caps[m] for m in group.members) for name, group in rates.groups.items()}
    between = water_filling({name: int(2 * group.weight) for name, group in rates.groups.items()}, total, held)
    for name, group in rates.groups.items():
        inside = water_filling(dict.fromkeys(group.members, 1), between[name], {m: caps[m] for m in group.members})
        assert all(abs(counts[member] - quota) < 1 for member, quota in inside.items())
        assert abs(sum(counts[member] for member in group.members) - between[name]) < 1


def test_the_ratio_holds_in_the_unit_of_count() -> None:
    """Kills a ratio of examples where tokens were asked for."""
    given = {"long": Supply(100, 10_000, 100), "short": Supply(1_000, 10_000, 1_000)}
    groups = {"l": Group(weight=3.0, members=("long",)), "s": Group(weight=1.0, members=("short",))}
    counts = plan_counts(given, MixSpec(rates=Groups(groups=groups), count="tokens", total_tokens=8_000)).counts
    assert counts == {"long": 60, "short": 200}


def test_a_name_in_no_group_is_an_error_unless_it_is_dropped() -> None:
    """Kills a task that a recipe of groups forgets without anybody noticing."""
    given = {name: Supply(10, 10, 10) for name in ("a", "b", "c")}
    groups = {"one": Group(members=("a",)), "two": Group(members=("b",))}
    with pytest.raises(PlanError, match=r"in no group: c; put every task into one, or set mix.rates.rest: drop"):
        plan_counts(given, MixSpec(rates=Groups(groups=groups)))
    dropped = plan_counts(given, MixSpec(rates=Groups(groups=groups, rest="drop")))
    assert dropped.counts == {"a": 10, "b": 10, "c": 0}
    assert any("task c: no share" in note for note in dropped.notes)
    with pytest.raises(PlanError, match=r"mix.rates.groups.one.members.0: no such task; known: b, c"):
        plan_counts({name: given[name] for name in ("b", "c")}, MixSpec(rates=Groups(groups=groups)))


def test_mistakes_inside_groups_are_told_when_the_recipe_is_read() -> None:
    """Kills a name in two groups, an empty group, and inner rates that name strangers or fix a budget."""
    with pytest.raises(ValueError, match=r"`a` is in groups.one.members and again in groups.two.groups.deep.members"):
        Groups(groups={"one": Group(members=("a",)), "two": Group(groups={"deep": Group(members=("a",))})})
    with pytest.raises(ValueError, match="one of them and not empty"):
        Group(weight=1.0)
    with pytest.raises(ValueError, match="are divided by their `weight`"):
        Group(groups={"deep": Group(members=("a",))}, rates=Equal())
    with pytest.raises(ValueError, match="names `maths`, which is not a member; did you mean `math`"):
        Group(members=("math",), rates=Explicit(weights={"maths": 1.0}))
    with pytest.raises(ValueError, match="counts"):
        Group.model_validate({"members": ["a"], "rates": {"kind": "counts", "counts": {"a": 1}}})
    with pytest.raises(PlanError, match=r"mix.rates.groups: every weight is 0"):
        compute_rates({"a": 1}, Groups(groups={"one": Group(weight=0.0, members=("a",))}))
    with pytest.raises(PlanError, match=r"mix.rates.groups.one.rates: no training record of a;"):
        compute_rates({"a": 0, "b": 1}, Groups(groups={"one": Group(members=("a",), rates=Capped())}, rest="drop"))
