"""Settings for the whole suite, and the hook that lets `mutants.py` put a wrong function in place of a right one."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

# The same examples on every machine: a failing property is a failing commit, not a matter of luck.
settings.register_profile(
    "suite", max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
# A mutant is rejected by its first failure: no need to make it small.
settings.register_profile(
    "mutants", parent=settings.get_profile("suite"), max_examples=15, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("mutants" if "TUTELAGE_MUTANT" in os.environ else "suite")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Plants the mutant named by TUTELAGE_MUTANT once all test modules are imported, so that no reference escapes it."""
    if name := os.environ.get("TUTELAGE_MUTANT"):
        import mutants

        mutants.plant(mutants.by_name(name))
