"""The model card: what this model is, from what, and how well, as Markdown with YAML front matter. Pure."""

from __future__ import annotations

import re

import yaml

from tutelage.report import tables, verdict
from tutelage.report.data import ReportData
from tutelage.report.look import visible

_LOADING = {
    "lora": """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```""",
    "full": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```""",
}
_ASKING = """\
```python
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))
```"""


def model_card(data: ReportData, *, folder: str = "model") -> str:
    """The text of the `README.md` in a model folder; `folder` is how the examples name it."""
    kind = str(data.adapter or data.train_facts.get("model_kind", "full"))
    parts = [
        _front_matter(data, kind),
        f"# {_line(data.title)}",
        _line(verdict.headline(data)),
        *([_line(extension)] if (extension := verdict.extension_sentence(data)) else []),
        *(["\n".join(f"- {_line(text)}" for text in verdict.by_task(data.task_changes))] if data.task_changes else []),
        *([f"## Held-out loss\n\n{_markdown(tables.change_table(data.changes))}"] if data.changes else []),
        f"## Training data\n\n{_line(verdict.drop_sentence(data))}\n\n{_markdown(tables.mixture_table(data.mixture))}",
        f"Licences of the records trained on: {_counted(data.licences)}. Origins: {_counted(data.origins)}.",
        f"## How to load it\n\n{_LOADING.get(kind, _LOADING['full']).format(folder=folder)}\n\n{_ASKING}",
        "Made by tutelage; `report.html` beside this folder shows where every record went.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(data: ReportData, kind: str) -> str:
    values = {
        **({"base_model": visible(data.base_model)} if data.base_model else {}),
        "library_name": "peft" if kind == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "tutelage"],
        "data_licences": [visible(licence) for licence in data.licences],
        "tasks": [visible(task.task) for task in data.mixture],
        **({"held_out_loss": {"before": round(data.total.before, 4), "after": round(data.total.after, 4)}} if data.total else {}),
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _markdown(table: tables.Table) -> str:
    """The table as Markdown."""
    head = [column.label for column in table.columns]
    rule = ["---:" if column.is_number else "---" for column in table.columns]
    return "\n".join(f"| {' | '.join(map(_line, row))} |" for row in (head, rule, *table.texts()))


def _line(text: str) -> str:
    """One line of Markdown in which nothing is markup: what comes from data must stay text."""
    if re.fullmatch(r"-+:?", text):
        return text
    return re.sub(r"([\\`*\[\]<>|#_~])", r"\\\1", " ".join(visible(text).split()))


def _counted(labels: object) -> str:
    assert isinstance(labels, dict)
    return ", ".join(f"{_line(name)} ({num:,})" for name, num in labels.items()) or "unknown"
