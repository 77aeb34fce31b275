"""A report that looks like a real one: made-up numbers of realistic size in the real record types, seeded."""

from __future__ import annotations

import dataclasses
import math
import random

from plan_fakes import fake_view, hostile_view

from tutelage.records import Dropped, Sample
from tutelage.report.data import (
    Account,
    Amount,
    Change,
    Curve,
    DroppedGroup,
    ReportData,
    Run,
    SamplePair,
    ShownExample,
    SourceFlow,
    TaskMixture,
)

TASKS = ("maths", "chat", "code", "dialogue", "qa", "reasoning")
HOSTILE = (
    '</script><img src=x onerror="alert(1)">{{ 7*7 }} \u202etxet\u202c \u200f\u05d0\u05d1 \x00\x07 &amp; \ud800 </style></title>'
)

_PROMPTS = {
    "maths": (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May?",
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72",
    ),
    "code": (
        "Write a function to find the shared elements from the given two lists.",
        "def similar_elements(test_tup1, test_tup2):\n    res = tuple(set(test_tup1) & set(test_tup2))\n    return (res)",
    ),
    "chat": (
        "Can you explain why the sky is blue? Erkläre es bitte kurz. 🙂",
        "Sunlight is scattered by the molecules of the air, and short waves more than long ones (∝ 1/λ⁴).",
    ),
    "dialogue": (
        "I'd like to order a large pizza with mushrooms.",
        "Sure. Would you like that delivered or will you pick it up?",
    ),
    "qa": ("When did Virgin Australia start operating?", "Virgin Australia commenced services on 31 August 2000."),
    "reasoning": (
        "Could a llama birth twice during War in Vietnam?",
        "Yes. The war lasted about 20 years; a llama's pregnancy lasts 11 months.",
    ),
}


def fake_report(seed: int = 0) -> ReportData:
    """A finished run of six tasks, one of them worse afterwards and one unclear."""
    rng = random.Random(seed)
    flows, dropped = _flows(rng)
    changes = _changes(rng)
    return ReportData(
        title="first",
        recipe_name="first",
        recipe_text=_RECIPE,
        flows=flows,
        dropped=dropped,
        rewritten={"strip_boilerplate": 143},
        mixture=_mixture(rng),
        plan_facts={"num_steps": 64, "capacity": 1024, "slots_per_step": 4096, "packing_efficiency": 0.9962},
        plan_notes=("riddles is held out as a whole (split.unseen_tasks).",),
        changes=changes,
        curves=_curves(rng, changes),
        learning_rates=tuple((i, 2e-4 * min(1, (i + 1) / 3) * (0.55 + 0.45 * math.cos(math.pi * i / 64))) for i in range(64)),
        samples=_samples(),
        examples=tuple(_example(task, index) for index in range(3) for task in TASKS),
        accounts=_accounts(flows),
        train_facts={
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 2,
            "processor": "x86_64, 2 cores",
            "seconds": 181.3,
            "best_step": 64,
        },
        licences={"MIT": 2100, "CC-BY-4.0": 620, "CC-BY-SA-3.0": 800, "Apache-2.0": 240},
        origins={"human": 3760},
        audit=_audit("maths", "maths/data/maths.jsonl:17"),
        base_model="bundled:smollm2-135m",
        adapter="lora",
        plan=fake_view(),
    )


def hostile_report() -> ReportData:
    """A small report in which every string that data can reach is an attack."""
    h = HOSTILE
    sample = Sample(h, 0, h, h, h, h, h, ended=False, num_tokens=3)
    amount = Amount(3, 30, 12)
    return ReportData(
        title=h,
        recipe_name=h,
        recipe_text=h,
        flows=(SourceFlow(h, 3, {"planned": 1, h: 2}),),
        dropped=(DroppedGroup(h, h, 2, (Dropped(h, h, 1, 0, h, h, h),)),),
        rewritten={h: 1},
        mixture=(TaskMixture(h, amount, amount, amount, 1.0, 1.0, 1, is_capped=False),),
        plan_facts={"num_steps": 1},
        plan_notes=(h,),
        changes=(Change(h, 2, 9, 2.0, 1.0, -1.2, -0.8), Change("", 2, 9, 2.0, 1.0, -1.2, -0.8)),
        curves=(Curve(h, "train", (0, 1), (2.0, 1.5)), Curve(h, "held-out", (0, 2), (2.0, 1.4))),
        learning_rates=((0, 1e-4), (1, 1e-5)),
        samples=(SamplePair(h, h, h, h, sample, sample),),
        examples=(ShownExample(h, h, h, 1, 2, 1, (Run("user", 0.0, (h,), (5,)), Run("assistant", 1.0, (h,), (7,)))),),
        accounts=(Account(h, "k" * 32, 3, 1, {h: 2}, 1.0, "", {h: h}),),
        train_facts={h: h},
        licences={h: 1},
        audit=_audit(h, h),
        base_model=h,
        plan=hostile_view(h),
    )


def _audit(source: str, record: str) -> dict[str, object]:
    """A warning in one source, and how much of it is learned."""
    part = {"source": source, "severity": "warning", "num": 3, "of": 40, "share": 0.075, "records": [record], "details": [""]}
    finding = {"finding": "unfinished_answer", "severity": "warning", "unit": "record", "num": 3, "sources": [part]}
    share = {"total": 0.41, "mean": 0.4, "quantiles": {"5": 0.1, "50": 0.4, "95": 0.8}}
    measured = {"num_examples": 40, "num_records": 40, "num_with_system": 10, "num_tokens": 9000, "supervised_share": share}
    words = {"means": "it breaks off", "remedy": f"look at {record}"}
    return {"passes": True, "findings": [finding | words], "sources": {source: measured}}


def planned_only(seed: int = 0) -> ReportData:
    """The same run before it was trained."""
    full = fake_report(seed)
    mixture = tuple(dataclasses.replace(task, realised=None) for task in full.mixture)
    return dataclasses.replace(full, mixture=mixture, changes=(), curves=(), learning_rates=(), samples=(), train_facts={})


def _flows(rng: random.Random) -> tuple[tuple[SourceFlow, ...], tuple[DroppedGroup, ...]]:
    flows, groups = [], []
    for task, size in zip((*TASKS, "riddles"), (1000, 620, 374, 160, 800, 760, 120), strict=True):
        held_out = size if task == "riddles" else size // 18
        drops = {"exact_duplicate": rng.randint(0, 9), "near_duplicate": rng.randint(0, 40), "overlong": rng.randint(0, 22)}
        drops |= {"repetition": rng.randint(0, 5), "leak": rng.randint(0, 3), "malformed_json": rng.randint(0, 2)}
        drops = {} if task == "riddles" else {reason: num for reason, num in drops.items() if num}
        rest = size - held_out - sum(drops.values())
        not_drawn = rest // 3 if task in ("maths", "qa") else 0
        fates = {"planned": rest - not_drawn, "held_out": held_out, "not_drawn": not_drawn, **drops}
        flows.append(SourceFlow(task, size, fates))
        groups += [DroppedGroup(task, reason, num, _drops(task, reason, min(num, 12))) for reason, num in drops.items()]
    return tuple(flows), tuple(groups)


def _drops(task: str, reason: str, num: int) -> tuple[Dropped, ...]:
    detail = {"near_duplicate": "similarity 0.93 to maths/data/maths.jsonl:17", "overlong": "2,311 tokens, at most 1,024"}
    text = _PROMPTS.get(task, _PROMPTS["qa"])[0]
    return tuple(Dropped(task, f"data/{task}.jsonl", 7 + 31 * i, i, reason, detail.get(reason, ""), text) for i in range(num))


def _mixture(rng: random.Random) -> tuple[TaskMixture, ...]:
    out = []
    sizes = (910, 560, 340, 140, 720, 700)
    weights = [size**0.5 for size in sizes]
    for task, size, weight in zip(TASKS, sizes, weights, strict=True):
        share = weight / sum(weights)
        planned = min(round(1200 * share), 2 * size)
        length, learned = rng.randint(110, 300), rng.uniform(0.35, 0.8)
        available = Amount(size, size * length, round(size * length * learned))
        plan = Amount(planned, planned * length, round(planned * length * learned))
        real = Amount(planned - rng.randint(0, 4), round(plan.tokens * 0.985), round(plan.supervised * 0.985))
        out.append(
            TaskMixture(
                task, available, plan, real, share, planned / size, math.ceil(planned / size), is_capped=task == "dialogue"
            )
        )
    return tuple(out)


def _changes(rng: random.Random) -> tuple[Change, ...]:
    before = {"maths": 1.912, "chat": 2.644, "code": 1.501, "dialogue": 2.987, "qa": 2.233, "reasoning": 2.051, "riddles": 3.102}
    delta = {
        "maths": -0.611,
        "chat": -0.118,
        "code": -0.204,
        "dialogue": -0.893,
        "qa": -0.012,
        "reasoning": -0.331,
        "riddles": 0.071,
    }
    out = []
    for task, was in before.items():
        wide = rng.uniform(0.02, 0.06)
        out.append(
            Change(
                task,
                rng.randint(9, 60),
                rng.randint(600, 1400),
                was,
                was + delta[task],
                delta[task] - wide,
                delta[task] + wide,
                task != "riddles",
            )
        )
    total = Change("", sum(c.num_items for c in out), sum(c.num_targets for c in out), 2.317, 2.041, -0.308, -0.246)
    return (*out, total)


def _curves(rng: random.Random, changes: tuple[Change, ...]) -> tuple[Curve, ...]:
    out = []
    for change in changes:
        steps = tuple(range(64))
        noise = 0.05 if change.task else 0.02
        values = tuple(change.after + 0.02 - change.change * math.exp(-i / 14) + rng.gauss(0, noise) for i in steps)
        if change.is_trained:
            out.append(Curve(change.task, "train", steps, values))
        marks = (0, 16, 32, 48, 64)
        out.append(Curve(change.task, "held-out", marks, tuple(change.after - change.change * math.exp(-i / 18) for i in marks)))
    return tuple(out)


def _samples() -> tuple[SamplePair, ...]:
    out = []
    for task, (prompt, answer) in _PROMPTS.items():
        shown = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        before = Sample(
            "before", 0, task, f"{task}/data/{task}.jsonl:41", shown, answer, "I'm not sure. " * 18, ended=False, num_tokens=96
        )
        after = dataclasses.replace(before, run="after", output=answer, ended=True, num_tokens=41)
        out.append(SamplePair(task, before.item, shown, answer, before, after))
    return tuple(out)


def _example(task: str, index: int) -> ShownExample:
    prompt, answer = _PROMPTS[task]
    parts = [
        ("scaffold", 0.0, "<|im_start|>user\n"),
        ("user", 0.0, prompt),
        ("scaffold", 0.0, "<|im_end|>\n<|im_start|>assistant\n"),
    ]
    if task == "reasoning":
        parts.insert(0, ("system", 0.0, "You answer yes or no, and say why."))
        parts.append(("reasoning", 1.0, "The war lasted from 1955 to 1975. "))
    if task == "dialogue":
        parts += [
            ("tool_call", 1.0, '{"name": "find_pizza", "arguments": {"size": "large"}}'),
            ("tool_result", 0.0, '{"price": 11.5}'),
        ]
    parts += [
        ("assistant", 0.5 if task == "chat" and index else 1.0, answer),
        ("stop", 1.0, "<|im_end|>"),
        ("scaffold", 0.0, "\n"),
    ]
    runs = tuple(_run(kind, weight, text) for kind, weight, text in parts)
    num = sum(len(run.ids) for run in runs)
    learned = sum(len(run.ids) for run in runs if run.weight > 0)
    return ShownExample(f"{task}/data/{task}.jsonl:{17 + index}", task, task, 1 + index, num, learned, runs)


def _run(kind: str, weight: float, text: str) -> Run:
    pieces = tuple(text[i : i + 4] for i in range(0, len(text), 4))
    return Run(kind, weight, pieces, tuple(1000 + len(piece) * 7 + i for i, piece in enumerate(pieces)))


def _accounts(flows: tuple[SourceFlow, ...]) -> tuple[Account, ...]:
    out = []
    for index, flow in enumerate(flows):
        drops = {"malformed_json": flow.fates["malformed_json"]} if "malformed_json" in flow.fates else {}
        out.append(
            Account(
                f"read {flow.source}",
                f"{index + 1:x}7" * 16,
                flow.num_read,
                flow.num_read - sum(drops.values()),
                drops,
                0.31,
                "",
                {"pyarrow": "25.0.0"},
            )
        )
    read = sum(account.num_out for account in out)
    fates = {"held_out": 290, "near_duplicate": 93, "overlong": 61, "exact_duplicate": 22, "not_drawn": 512}
    out.append(
        Account("plan", "ab" * 16, read, read - sum(fates.values()), fates, 0.8, "", {"numpy": "2.5.1", "numba": "0.66.0"})
    )
    out.append(
        Account("train", "cd" * 16, 64, 64, {}, 181.3, "", {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.20.0"})
    )
    return tuple(out)


_RECIPE = """\
name: first                                   # recipes/first.yaml:1
model:
  name: bundled:smollm2-135m                  # default
  adapter: {kind: lora, rank: 16}             # recipes/first.yaml:3
sources:
  maths:
    path: data/maths.jsonl                    # recipes/first.yaml:6
    task: maths                               # recipes/first.yaml:6
    licence: MIT                              # recipes/first.yaml:6
mix:
  rates: {kind: temperature, temperature: 2}  # --set
  max_visits: 2                               # recipes/first.yaml:22
"""
