"""What `tutelage merge` does: a tuned adapter added into its base, as an ordinary model folder that any tool opens."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import ModelError
from tutelage.store import Json

NUM_PROBES = 24
"""Tokens on which the merged model is compared with base and adapter."""


@dataclass(frozen=True)
class Merged:
    """What was written. `difference` is the largest in any logit between it and base with adapter, `spread` their deviation."""

    folder: str
    base: str
    dtype: str
    stop_ids: tuple[int, ...]
    difference: float
    spread: float

    def as_json(self) -> dict[str, Json]:
        """As plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What people read."""
        return [
            f"{self.folder}: {self.base} with the adapter added in, {self.dtype}, ends at {list(self.stop_ids)}",
            f"read back, its logits differ from the adapter's by at most {self.difference:.2g}; they spread by {self.spread:.2g}",
        ]


def merge_folder(folder: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False) -> Merged:
    """The `Merged` of `folder`, a run folder or the adapter folder in it, written to `out` and read back.

    The sum is made in float32 and stored in `dtype`, by default the precision in which the base is stored. Raises
    `ModelError` when there is no adapter, or `out` has files and may not be overwritten.
    """
    from tutelage.model import describe, load_model, load_tokenizer, merge_and_save
    from tutelage.model.load import dtype_named
    from tutelage.model.names import base_folder

    folder = _adapter_folder(folder)
    base = base_folder(folder)
    stored = dtype or _stored_dtype(base)
    dtype_named(stored)
    _make_room(out, source=folder, overwrite=overwrite)
    stop_ids = tuple(describe(folder).end_ids)
    model = load_model(folder, dtype="float32")
    expected = _probe_logits(model)
    merge_and_save(model, out, tokenizer=load_tokenizer(folder), stop_ids=stop_ids, dtype=stored)
    del model
    if (folder / "README.md").is_file():
        shutil.copyfile(folder / "README.md", out / "README.md")
    difference = (_probe_logits(load_model(out, dtype="float32")) - expected).abs().max().item()
    return Merged(str(out), str(base), stored, stop_ids, difference, expected.std().item())


def _adapter_folder(folder: Path) -> Path:
    """The folder with the adapter: itself, or `model/` of a run."""
    inner = folder / "model" if (folder / "model").is_dir() else folder
    if not inner.is_dir():
        raise ModelError(f"{folder}: no such folder; `tutelage run RECIPE` leaves one in runs/NAME")
    if not (inner / "adapter_config.json").is_file():
        raise ModelError(f"{inner}: no adapter here; a fully tuned model is an ordinary model folder already: use it as it is")
    return inner


def _stored_dtype(base: Path) -> str:
    """The precision that a base's configuration names; float32 where it names none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _make_room(out: Path, *, source: Path, overwrite: bool) -> None:
    """Nothing; `out` is an empty folder."""
    if out.resolve() == source.resolve():
        raise ModelError(f"{out}: is the adapter itself; name another folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ModelError(f"{out}: has files already; name another folder, or add --overwrite")
        if not (out / "config.json").is_file():
            raise ModelError(f"{out}: is no model folder, so --overwrite would delete something else; name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def _probe_logits(model: Any) -> Any:
    """[N, V] logits of a few tokens spread over the vocabulary."""
    import torch

    num_words = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return model(input_ids=((torch.arange(NUM_PROBES) * 7919 + 17) % num_words)[None], use_cache=False).logits[0]
