"""Mixtures of every kind, for Hypothesis, and the demands that a refusal names."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.plan.rates import Mixture, Supply, plan_counts
from tutelage.plan.spec import Capped, Equal, Explicit, Group, Groups, MixSpec, Proportional, Rates, Temperature, UniMax

NAMES = ["a", "b", "c", "d", "e", "f"]
_NAMED = re.compile(r"(?:reach at most|minima alone take|comes to one is) ([\d,.]+\d|\d)")
_LESS = re.compile(r"make at most ([\d,]*\d)")


@st.composite
def supplies(draw: st.DrawFn, names: list[str] | None = None) -> dict[str, Supply]:
    """Up to six names with a few records each, of one to twenty tokens."""
    chosen = names or draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    out = {}
    for name in chosen:
        num = draw(st.integers(1, 40))
        tokens = draw(st.integers(num, 20 * num))
        out[name] = Supply(num, tokens, draw(st.integers(1, tokens)))
    return out


def flat_rates(names: list[str]) -> st.SearchStrategy[Rates]:
    """Every rule without groups that gives everybody a share."""
    weights = st.fixed_dictionaries({name: st.sampled_from([0.1, 0.5, 1.0, 3.0]) for name in names})
    return st.one_of(
        st.sampled_from([Proportional(), Equal(), Temperature(temperature=2.0), Temperature(temperature=0.5)]),
        st.builds(Capped, cap=st.integers(1, 30), temperature=st.sampled_from([1.0, 3.0])),
        weights.map(lambda found: Explicit(weights=found)),
        st.sampled_from([1.0, 2.5, 4.0]).map(lambda most: UniMax(max_epochs=most)),
    )


@st.composite
def grouped(draw: st.DrawFn, names: list[str]) -> Groups:
    """The names dealt into two groups and, where they suffice, a group of two groups."""
    deal = draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    hands = [tuple(name for name, hand in zip(names, deal, strict=True) if hand == which) for which in range(4)]
    weight = st.sampled_from([0.5, 1.0, 1.5, 3.0])
    leaves = [Group(weight=draw(weight), members=hand, rates=draw(flat_rates(list(hand)))) for hand in hands if hand]
    outer = {f"g{i}": group for i, group in enumerate(leaves[:2])}
    if leaves[2:]:
        outer["nested"] = Group(weight=draw(weight), groups={f"h{i}": group for i, group in enumerate(leaves[2:])})
    return Groups(groups=outer)


@st.composite
def bounds(draw: st.DrawFn, names: list[str], *, most: int) -> int | dict[str, int] | None:
    """None, one number, or numbers by name with or without a default."""
    number = st.integers(1, most)
    by_name = st.dictionaries(st.sampled_from([*names, "default"]), number, max_size=3)
    return draw(st.one_of(st.none(), number, by_name))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[dict[str, Supply], MixSpec]:
    """Supplies and a recipe that may ask too much or too little of them."""
    given = draw(supplies())
    names = sorted(given)
    budgets: list[dict[str, object]] = [
        {"epochs": draw(st.sampled_from([0.05, 0.5, 1.0, 2.7, 6.0]))},
        {"total_examples": draw(st.integers(1, 400))},
        {"total_tokens": draw(st.integers(1, 3000))},
        {"total_supervised_tokens": draw(st.integers(1, 3000))},
    ]
    return given, MixSpec(
        rates=draw(st.one_of(flat_rates(names), grouped(names))),
        count=draw(st.sampled_from(["examples", "tokens", "supervised_tokens"])),
        max_visits=draw(bounds(names, most=4)),
        min_examples=draw(bounds(names, most=12)),
        **draw(st.sampled_from(budgets)),  # type: ignore[arg-type]
    )


def met(given: dict[str, Supply], mix: MixSpec) -> tuple[Mixture, MixSpec]:
    """The mixture, or the one that the refusal says can be met: that must then be accepted at once."""
    try:
        return plan_counts(given, mix), mix
    except PlanError as error:
        if less := _LESS.search(str(error)):
            return met(given, mix.model_copy(update={"min_examples": None if less[1] == "0" else int(less[1].replace(",", ""))}))
        named = _NAMED.search(str(error))
        assert named, f"names no number: {error}"
        field = str(error).split()[0].removeprefix("mix.")
        number = float(named[1].replace(",", ""))
        near = mix.model_copy(update={field: number if field == "epochs" else int(number)})
        return plan_counts(given, near), near
