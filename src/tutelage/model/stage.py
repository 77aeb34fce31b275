"""The model's door to the store: the starting model, and apart from it the tokenizer, so that new weights re-render nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage.errors import ModelError
from tutelage.model.names import Resolved, materialise, resolve
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_ONE = Counts(1, 1)


def model_stage(name: str, *, store: Store, new_tokens: Sequence[str] = ()) -> Stage:
    """The starting model: dequantised once into the store for a bundled one, else a pointer to its folder.

    With `new_tokens` it is a copy in the store, tokenizer included, that has them.
    """
    resolved = resolve(name)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        if new_tokens:
            return _build_with_tokens(resolved, folder, new_tokens, progress)
        if resolved.kind != "bundled":
            return Outcome(_ONE, {"folder": str(resolved.path.resolve())})
        from tutelage.model.bundled import write_bundled

        progress.note(f"writing {name} as an ordinary model folder, once")
        written = write_bundled(folder, resolved.path)
        return Outcome(_ONE, {name: value for name, value in written.items() if name != "folder"})

    files = {path.name: store.file_digest(path) for path in resolved.files}
    if new_tokens:
        made = ("gguf", "tokenizers", "safetensors", "transformers")
        return Stage("model", 1, {"files": files, "new_tokens": list(new_tokens)}, build, packages=made)
    where = {} if resolved.kind == "bundled" else {"folder": str(resolved.path.resolve())}
    packages = ("gguf", "tokenizers", "safetensors") if resolved.kind == "bundled" else ()
    return Stage("model", 1, {"files": files, **where}, build, packages=packages)


def _build_with_tokens(resolved: Resolved, folder: Path, new_tokens: Sequence[str], progress: Progress) -> Outcome:
    """A copy of the model whose vocabulary has these tokens, and their ids."""
    from tutelage.model.embeddings import write_with_tokens

    progress.note(f"writing {resolved.name} with {len(new_tokens)} new token{'s' * (len(new_tokens) > 1)}, once")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ids = write_with_tokens(materialise(resolved, Path(scratch)), folder, new_tokens)
    return Outcome(_ONE, {"new_token_ids": ids})


def tokenizer_stage(name: str, *, model: Stage, store: Store, new_tokens: Sequence[str] = ()) -> Stage:
    """The tokenizer, chat template and end tokens of the starting model, in a folder of their own."""
    resolved = resolve(name)
    is_made = resolved.kind == "bundled" or bool(new_tokens)
    inputs, files = ({"model": model}, {}) if is_made else ({}, _tokenizer_digests(resolved, store))

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        origin = inputs["model"].path if inputs else resolved.path
        found = [origin / file for file in TOKENIZER_FILES if (origin / file).is_file()]
        for path in found:
            shutil.copyfile(path, folder / path.name)
        kept = _keep_opened(folder)
        return Outcome(_ONE, {"files": [path.name for path in found], "kept_opened": kept})

    return Stage("tokenizer", 3, {"files": files}, build, inputs=inputs, packages=("tokenizers", "transformers"))


def _keep_opened(folder: Path) -> bool:
    """Keeps the tokenizer as `AutoTokenizer` opens it, which takes seconds, unless its class leaves tokenizer.json alone."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if (folder / "tokenizer.json").exists() and config.get("tokenizer_class") in AS_IS_CLASSES:
        return False
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"transformers cannot open the model's tokenizer: {first} (a SentencePiece model needs `pip install sentencepiece`)"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        return False
    backend.no_truncation()
    backend.no_padding()
    template = loaded.chat_template
    templates = {"default": template} if isinstance(template, str) else dict(template or {})
    kept = {"special_tokens": dict(loaded.special_tokens_map), "templates": templates}
    (folder / OPENED).write_text(json.dumps(kept), encoding="utf-8")
    (folder / OPENED_BACKEND).write_text(backend.to_str(), encoding="utf-8")
    return True


OPENED, OPENED_BACKEND = "opened_tokenizer.json", "opened_backend.json"
AS_IS_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def model_folder(artefact: Artefact) -> Path:
    """Where `AutoModelForCausalLM.from_pretrained` loads the model of a `model` artefact from."""
    return Path(str(artefact.facts["folder"])) if "folder" in artefact.facts else artefact.path


def _tokenizer_digests(resolved: Resolved, store: Store) -> dict[str, str]:
    files = {f: store.file_digest(resolved.path / f) for f in TOKENIZER_FILES if (resolved.path / f).is_file()}
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        raise ModelError(f"model.name: {resolved.name!r} has no tokenizer.json; save its tokenizer beside the weights")
    return files
