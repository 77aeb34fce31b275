"""Shortening by whole exchanges."""

from __future__ import annotations

import functools
import operator

from hypothesis import given
from hypothesis import strategies as st

from tutelage.render.overlong import exchanges, shorter_versions

ROLES = st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=12)


@given(roles=ROLES, has_system=st.booleans())
def test_shorter_versions_lose_oldest_exchanges_and_nothing_else(roles, has_system):
    """Kills dropping from the end, splitting an exchange, and losing the system turn or the last answer."""
    roles = (["system"] if has_system else []) + roles
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=None)
    previous = None
    for kept in shorter_versions(roles):
        assert last in kept and (not has_system or kept[0] == 0)
        body = [turn for turn in kept if roles[turn] != "system"]
        assert body == list(range(body[0], last + 1))
        assert body in [functools.reduce(operator.iadd, exchanges(roles[: last + 1])[k:], []) for k in range(1, len(roles))]
        assert previous is None or len(kept) < len(previous)
        previous = kept
