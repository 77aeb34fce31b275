"""A model folder to a model in memory: device, dtype, our attention, and low-rank adapters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tutelage.errors import MissingExtra, ModelError, did_you_mean
from tutelage.model.attention import ATTENTION_NAME, install_attention
from tutelage.model.embeddings import token_rows
from tutelage.model.loss import unwrapped
from tutelage.model.names import base_folder
from tutelage.model.spec import Lora

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1")
BYPASSED = {"out_proj", "dt_proj", "conv1d"}
"""Layers of state-space models whose weight is used without calling them: an adapter there would never be trained."""

BFLOAT16_WORTH = 1.5
"""bfloat16 is chosen from this many times the float32 matmul rate on: below it the lost digits buy too little."""


def load_model(folder: Path | str, *, dtype: str = "float32", device: str = "cpu", attention: bool = True) -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode, weights in `dtype` (`float32`, `bfloat16`, ...) on `device`.

    With `attention` it keeps packed documents apart (see `attention.py`) and is otherwise plain SDPA. For an adapter
    folder the base it names is loaded in `dtype` and the adapter (peft, float32) is put on. Only safetensors are read
    and no code from the folder is run. Raises `ModelError` when that does not suffice.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _load_adapter(folder, load_model(base_folder(folder), dtype=dtype, device=device, attention=attention))
    install_attention()
    with without_progress(), _as_model_error(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype_named(dtype),
            attn_implementation=ATTENTION_NAME if attention else None,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model.to(device).eval()


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer in `folder` (`PreTrainedTokenizerFast`). Raises `ModelError` when there is none."""
    with _as_model_error(Path(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _load_adapter(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """`base` under the adapter in `folder`, with the stop tokens that were saved beside the adapter."""
    peft = _import_peft()
    with _as_model_error(folder), _without_peft_warning():
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=False)
        if (folder / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def add_adapter(model: PreTrainedModel, lora: Lora, *, seed: int = 0, new_token_ids: Sequence[int] = ()) -> Any:
    """`model` inside a peft LoRA wrapper: base frozen, adapters float32 and trainable, the update scaled by alpha / rank.

    The start depends on `seed` alone and the caller's random state is left as it was. The update starts at zero, so
    the logits are unchanged. Adapters are float32 over a narrower base too: at usual learning rates an update is below
    what bfloat16 can add to a weight. The rows of `new_token_ids` in embeddings and head are trained too, and saved with the
    adapter. Raises `ModelError` when a target names no module, or the output layer, or when
    there are fewer layers than `top_layers`.
    """
    peft = _import_peft()
    if lora.targets != "all_linear":
        _require_targets(model, lora.targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_target_names(model, lora),
        layers_to_transform=_top_layers(model, lora.top_layers),
        trainable_token_indices=token_rows(model, new_token_ids) if new_token_ids else None,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _without_peft_warning():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


def _target_names(model: PreTrainedModel, lora: Lora) -> str | list[str]:
    if lora.targets != "all_linear":
        return list(lora.targets)
    is_state_space = model.config.model_type in STATE_SPACE
    if lora.top_layers is None and not is_state_space:
        return "all-linear"
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, linear) and m is not head}
    return sorted(names - (BYPASSED if is_state_space else set()))


def _top_layers(model: PreTrainedModel, number: int | None) -> list[int] | None:
    """The numbers of the last so many layers; None for all."""
    if number is None:
        return None
    total = int(model.config.get_text_config().num_hidden_layers)
    if number > total:
        raise ModelError(f"model.adapter.top_layers: {number}, but the model has {total} layers; leave it out for all")
    return list(range(total - number, total))


def checkpoint_activations(model: Any) -> None:
    """Nothing; from here on training keeps only each layer's input and runs the layer again in backward.

    About a third more time for a fraction of the memory; loss and gradients are the same. Raises `ModelError` when the
    architecture cannot do it.
    """
    base = unwrapped(model)
    # transformers renamed it in 5.x and warns at the old name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        # Only the non-reentrant kind lets gradients pass a layer whose input needs none (frozen embeddings under LoRA).
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"{type(base).__name__} cannot run its layers again in backward; turn checkpointing off") from error


def _require_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Nothing; raises `ModelError` unless every target is the last part of some linear module's name, and not the head."""
    head = model.get_output_embeddings()
    known = {
        name.rpartition(".")[2]: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    for target in targets:
        if target.rpartition(".")[2] not in known:
            linear = [name for name, module in known.items() if module.weight.ndim == 2 and module is not head]
            raise ModelError(f"model.adapter.targets: no module is named {target!r}; {did_you_mean(target, linear)}")
        if known[target.rpartition(".")[2]] is head:
            raise ModelError(f"model.adapter.targets: {target!r} is the output layer, which stays as it is; leave it out")


def choose_device() -> str:
    """`cuda` where a CUDA device can be used, else `mps` (an Apple GPU), else `cpu`."""
    # TODO(mps): nothing here has been run on an Apple GPU; the isolation check refuses to train on wrong numbers.
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(device: str) -> tuple[str, str]:
    """(`bfloat16` or `float32`, why): bfloat16 where a matrix product is `BFLOAT16_WORTH` times as fast, measured now.

    Takes a fraction of a second. The answer belongs in the run's record: it depends on the machine.
    """
    rates = {name: _matmul_rate(DTYPES[name], device) for name in ("float32", "bfloat16")}
    ratio = rates["bfloat16"] / rates["float32"]
    reason = f"bf16: {ratio:.2g}x the float32 matmul rate here"
    return ("bfloat16", reason) if ratio >= BFLOAT16_WORTH else ("float32", f"{reason}, under the {BFLOAT16_WORTH}x it must gain")


def _matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Products per second of a square matrix with itself: the best within 0.1 s, after a warm-up.

    Bounded by time because a processor without bfloat16 instructions can be hundreds of times slower at it.
    """
    size = 4096 if device.startswith("cuda") else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = [_seconds_of(matrix)]
    while len(seconds) < 3 or (sum(seconds) < 0.1 and len(seconds) < 50):
        seconds.append(_seconds_of(matrix))
        if sum(seconds) > 1.0:
            break
    return 1.0 / min(seconds[1:])


def _seconds_of(matrix: torch.Tensor) -> float:
    """Seconds for one product of `matrix` with itself. Reading a number back waits for a GPU to have done the work."""
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - start


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a name. Raises `ModelError` on an unknown one."""
    if name not in DTYPES:
        raise ModelError(f"no dtype {name!r}; {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def _import_peft() -> Any:
    """The peft package; raises `MissingExtra` without it."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    return peft


@contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """Nothing; turns what transformers raises over a folder into a `ModelError` that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{folder} could not be loaded: {error}; it must hold safetensors, config.json and tokenizer files of an "
            "architecture that transformers knows (code inside the folder is never run)"
        ) from error


@contextmanager
def _without_peft_warning() -> Iterator[None]:
    """Nothing; hides one warning of transformers about a name that peft, not the user, still calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


@contextmanager
def without_progress() -> Iterator[None]:
    """Nothing; transformers draws no progress bar while it is open."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
