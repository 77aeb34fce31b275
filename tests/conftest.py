"""Settings for the whole suite; under `mutants.py` properties are tried less."""

from __future__ import annotations

import os

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
