"""What every side is given: the same conversations as JSONL, and model folders whose chat template marks what is trained."""

from __future__ import annotations

import glob
import gzip
import json
import random
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from peer_environments import PEERS

BUNDLED = "bundled:smollm2-135m"
_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] "
    "+ '\n' }}{% set text = message['content'] + '<|im_end|>' %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ text }}{% endgeneration %}{% else %}{{ text }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% set text = message.content %}{% if message.role "
    "== 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% set text = message.content.lstrip('\n') %}{% endif %}"
    "{% set text = text + '<|im_end|>' %}{% if message.role == 'assistant' %}{% generation %}{{ text }}{% endgeneration %}"
    "{% else %}{{ text }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' }}{% set text = message['content'] | trim + '<|eot_id|>' %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text }}{% endgeneration %}{% else %}{{ text }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {"qwen3": _QWEN3, "llama3": _LLAMA3, "smollm2": _SMOLLM2}
"""What TRL needs and the tokenizers' own templates lack: marks around what the assistant writes. The text stays the same."""
HEADERS = {"llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
"""What a tokenizer's own template writes after every conversation, asked for or not; ours does so when asked."""


def unpacked(path: Path) -> bytes:
    if path.suffix == ".zst":
        import zstandard

        with path.open("rb") as file:
            return bytes(zstandard.ZstdDecompressor().stream_reader(file).read())
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


# ---- conversations

Turns = list[dict[str, str]]


def write_sets(patterns: Sequence[str], folder: Path, *, rows: int | None, in_one: bool = False) -> dict[str, dict[str, Any]]:
    """The single-turn and the multi-turn conversations below `folder`, `{"messages": [...]}` per line, a file per source.

    So many `rows` in one mixed order; single-turn ones are repeated with suffixes where there are fewer. None takes all.
    """
    by_kind: dict[str, list[tuple[str, Turns]]] = defaultdict(list)
    for path in sorted(Path(name) for pattern in patterns for name in glob.glob(pattern)):
        for turns in plain_turns(path):
            is_single = sum(turn["role"] == "assistant" for turn in turns) == 1
            by_kind["single-turn" if is_single else "multi-turn"].append(("all" if in_one else _label(path), turns))
    if not by_kind["single-turn"]:
        raise SystemExit(f"--data {' '.join(patterns)}: no single-turn conversations there; give globs of JSONL files")
    made = {}
    for kind, found in sorted(by_kind.items(), reverse=True):
        random.Random(0).shuffle(found)
        wanted = rows or len(found)
        chosen = list(islice(_laps(found), wanted if kind == "single-turn" else min(wanted, len(found))))
        made[kind] = _write(chosen, folder / kind)
    return made


def _label(path: Path) -> str:
    return re.sub(r"[^\w-]", "-", path.name.partition(".")[0])


def _laps(found: Sequence[tuple[str, Turns]]) -> Iterator[tuple[str, Turns]]:
    """Over and over; from the second time on messages end in " (2)", " (3)", ..."""
    for lap in count(1):
        for name, turns in found:
            yield name, [{**turn, "content": f"{turn['content']} ({lap})"} for turn in turns] if lap > 1 else turns


def _write(chosen: Iterable[tuple[str, Turns]], folder: Path) -> dict[str, Any]:
    lines: dict[str, list[str]] = defaultdict(list)
    for name, turns in chosen:
        lines[name].append(json.dumps({"messages": turns}) + "\n")
    folder.mkdir(parents=True)
    files = {name: folder / f"{name}.jsonl" for name in sorted(lines)}
    for name, path in files.items():
        path.write_text("".join(lines[name]), encoding="utf-8")
    size = sum(path.stat().st_size for path in files.values())
    return {"files": {name: str(path) for name, path in files.items()}, "rows": sum(map(len, lines.values())), "bytes": size}


def plain_turns(path: Path) -> Iterator[Turns]:
    """The conversations of one file that are text alone; malformed records and those with tools are left out."""
    from tutelage.errors import DataError
    from tutelage.sources.detect import choose, shape_named, spread
    from tutelage.sources.reasons import Malformed
    from tutelage.sources.shapes import split_instances

    records = [json.loads(line) for line in unpacked(path).decode().split("\n") if line.strip()]
    try:
        name = choose(spread(records)).name
    except DataError as error:
        print(f"{path.name}: left out: {str(error).partition(';')[0]}")
        return
    if name == "natural_instructions":
        records = [each for record in records for each in split_instances(record)]
    shape = shape_named(name, None)
    for record in records:
        try:
            turns, tools = shape(record)
        except Malformed:
            continue
        if tools is None and all(not any(rest) for _, _, *rest in turns):
            yield [{"role": role, "content": content} for role, content, *_ in turns]


def read_lines(files: Iterable[str]) -> Iterator[Turns]:
    """The conversations of files that `write_sets` wrote."""
    for file in files:
        with Path(file).open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield json.loads(line)["messages"]


def write_million(files: Iterable[str], target: Path, *, rows: int) -> None:
    """So many records in one file: the conversations again and again, each with its number in the text."""
    first = list(read_lines(files))
    with target.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = first[number % len(first)]
            numbered = [{**turns[0], "content": f"{number}: {turns[0]['content']}"}, *turns[1:]]
            file.write(json.dumps({"messages": numbered}) + "\n")


# ---- model folders


def write_models(tokenizers: str | None, folder: Path, *, only: Sequence[str] | None = None) -> dict[str, Path]:
    """A model folder per tokenizer, by name: Qwen3's, Llama 3's and SmolLM2's of a folder, or the bundled one alone."""
    if tokenizers is None:
        whole = bundled_folder()
        return {"smollm2": _write_model("smollm2", whole, folder / "smollm2")}
    names = [name for name in TEMPLATES if name in (only or TEMPLATES)]
    found = {name: Path(tokenizers) / name for name in names if (Path(tokenizers) / name).is_dir()}
    if not found:
        raise SystemExit(f"--tokenizers {tokenizers}: none of the folders {', '.join(names or TEMPLATES)} is there")
    return {name: _write_model(name, path, folder / name) for name, path in found.items()}


def _write_model(name: str, origin: Path, target: Path) -> Path:
    """The tokenizer with the marked template, its own one as native.jinja, and stand-ins for weights and configuration.

    Preparation needs no weights, but tutelage hashes them, and the peers read the configuration.
    """
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    from tutelage.render.tokenizer import open_tokenizer

    target.mkdir(parents=True)
    packed = origin / "tokenizer.json.zst"
    (target / "tokenizer.json").write_bytes(unpacked(packed if packed.exists() else origin / "tokenizer.json"))
    shutil.copyfile(origin / "tokenizer_config.json", target / "tokenizer_config.json")
    if (origin / "chat_template.jinja").exists():
        shutil.copyfile(origin / "chat_template.jinja", target / "chat_template.jinja")
    native = open_tokenizer(target).templates["default"]
    (target / "native.jinja").write_text(native, encoding="utf-8")
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATES[name]}), encoding="utf-8")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    size = Tokenizer.from_file(str(target / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": size, **small}
    (target / "config.json").write_text(json.dumps(said))
    save_file({"stand_in": np.zeros(1, np.float32)}, target / "model.safetensors")
    return target


def bundled_folder() -> Path:
    """The bundled model's tokenizer files, kept: writing the whole model takes a while."""
    from tutelage.model.names import materialise, resolve

    target = PEERS / "tokenizers" / "smollm2"
    if not (target / "tokenizer_config.json").is_file():
        with tempfile.TemporaryDirectory() as folder:
            whole = materialise(resolve(BUNDLED), Path(folder))
            target.mkdir(parents=True, exist_ok=True)
            for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
                if (whole / name).is_file():
                    shutil.copyfile(whole / name, target / name)
    return target
