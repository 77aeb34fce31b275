"""Every objective at once in two processes: the losses, norms and weights of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from several import in_ranks
from tiny_ranks import Found, Tiny, run_tiny_ranks
from tutelage.train.spec import Kl

EVERYTHING = (
    ("objective", "dft"),
    ("neftune_alpha", 5.0),
    ("kl", Kl(weight=0.5, direction="reverse", kinds=("user", "assistant"))),
)
FULL, LORA = Tiny(changes=EVERYTHING), Tiny(adapter=True, tied=False, changes=EVERYTHING)
CASES = {
    "full": FULL,
    "lora": LORA,
    "full, cut": dataclasses.replace(FULL, parallel="fsdp"),
    "lora, cut": dataclasses.replace(LORA, parallel="fsdp"),
}


def run_all(folder: Path, cases: Mapping[str, Tiny]) -> dict[str, Found]:
    """Every case after the other, in folders that all ranks share."""
    for name in cases:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {name: run_tiny_ranks(folder / name, tiny) for name, tiny in cases.items()}


@pytest.mark.slow
def test_two_ranks_with_everything_on_train_as_one(tmp_path: Path) -> None:
    """Kills noise from a rank's own generator, a pull averaged over a rank's own places, a start that only one rank holds."""
    alone = run_all(tmp_path / "alone", CASES)
    plain = run_all(tmp_path / "plain", {"full": dataclasses.replace(FULL, changes=())})["full"]
    assert not np.allclose(plain.losses, alone["full"].losses, rtol=1e-6), "objectives without effect would show nothing"
    together = in_ranks(2, run_all, tmp_path / "together", CASES)[0]
    for name, one in alone.items():
        other = together[name]
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(other.norms, one.norms, rtol=1e-9, err_msg=name)
        for weight, values in one.weights.items():
            np.testing.assert_allclose(other.weights[weight], values, rtol=1e-9, atol=1e-11, err_msg=f"{name} {weight}")
