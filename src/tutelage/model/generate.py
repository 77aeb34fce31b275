"""Prompts to answers: greedy or sampled, the same for a prompt whether it is run alone or in a batch.

One loop serves both doors: `generate` runs batches, `stream` a batch of one. Left padding is hidden by the attention mask
and positions start at 0 at the first real token; each prompt draws from a random source of its own, made from the seed
and the prompt, so neighbours change nothing and the caller's random state is left alone. Models that carry a state along
the row (state-space, recurrent) would take padding into it: their batches hold prompts of one length.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ModelError
from tutelage.model.loss import unwrapped

MAX_BATCH = 32
MAX_BATCH_TOKENS = 16_384
"""Rows x (prompt + new tokens) of one batch: bounds the memory of the key-value cache."""


@dataclass(frozen=True)
class Generation:
    """One answer: `ids` without the stop token, `text` decoded without special tokens, `ended` = a stop token was reached."""

    ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class _Sampling:
    """What decides the next token and when to stop."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"cannot sample with max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}; "
                "allowed: at least 1, at least 0 (0 is greedy), above 0 up to 1"
            )


def generate(  # noqa: PLR0913 - each is a word that users of language models know
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Generation]:
    """One `Generation` per prompt (token ids), in the order of the prompts.

    Temperature 0 takes the likeliest token; above 0 each prompt draws from its own source, made from `seed`, its ids and
    how often the same prompt came before in this call, so that repeating a prompt n times gives n different draws.
    Prompts of like length share a batch. Raises `ModelError` on an empty prompt or numbers that mean nothing.
    """
    sampling = _Sampling(max_new_tokens, frozenset(stop_ids), temperature, top_p, seed)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ModelError("a prompt without tokens cannot be continued; give at least a start token")
    sources = _random_sources(prompts, seed=seed)
    answers: dict[int, list[int]] = {}
    is_padded = not _is_stateful(model)
    for batch in _batches([len(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, is_padded=is_padded):
        new: dict[int, list[int]] = {index: [] for index in batch}
        rows = [list(prompts[index]) for index in batch]
        for row, token in _tokens(model, rows, sampling, [sources[index] for index in batch]):
            new[batch[row]].append(token)
        answers.update(new)
    return [_generation(tokenizer, answers[index], sampling.stop_ids) for index in range(len(prompts))]


def stream(  # noqa: PLR0913 - those of generate
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of text as they are made; joined they are the `text` that `generate` gives for the same arguments.

    A piece is held back while its last character is incomplete (a multi-byte character split over tokens).
    """
    sampling = _Sampling(max_new_tokens, frozenset(stop_ids), temperature, top_p, seed)
    if not prompt:
        raise ModelError("a prompt without tokens cannot be continued; give at least a start token")
    ids: list[int] = []
    shown = ""
    for _, token in _tokens(model, [list(prompt)], sampling, _random_sources([prompt], seed=seed)):
        ids.append(token)
        text = _generation(tokenizer, ids, sampling.stop_ids).text
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = _generation(tokenizer, ids, sampling.stop_ids).text[len(shown) :]
    if rest:
        yield rest


def _generation(tokenizer: Any, ids: list[int], stop_ids: frozenset[int]) -> Generation:
    """The answer of one row, its stop token cut off."""
    ended = bool(ids) and ids[-1] in stop_ids
    kept = ids[:-1] if ended else ids
    return Generation(list(kept), tokenizer.decode(kept, skip_special_tokens=True), ended)


def _random_sources(prompts: Sequence[Sequence[int]], *, seed: int) -> list[torch.Generator]:
    """One CPU generator per prompt, seeded by (seed, its ids, how often these ids came before)."""
    seen: Counter[tuple[int, ...]] = Counter()
    sources = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(repr((seed, seen[key], key)).encode()).digest()
        seen[key] += 1
        sources.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return sources


def _batches(lengths: Sequence[int], *, max_new_tokens: int, is_padded: bool = True) -> Iterator[list[int]]:
    """Prompt numbers, longest first, cut at `MAX_BATCH` rows or `MAX_BATCH_TOKENS` tokens; unpadded, of one length each.

    >>> list(_batches([3, 9, 4], max_new_tokens=8_000))
    [[1, 2], [0]]
    >>> list(_batches([3, 9, 3], max_new_tokens=8, is_padded=False))
    [[1], [0, 2]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        widest = lengths[batch[0] if batch else index] + max_new_tokens
        is_full = len(batch) == MAX_BATCH or (len(batch) + 1) * widest > MAX_BATCH_TOKENS
        if batch and (is_full or (not is_padded and lengths[index] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _tokens(model: Any, rows: list[list[int]], sampling: _Sampling, sources: list[torch.Generator]) -> Iterator[tuple[int, int]]:
    """(row, new token) pairs in the order in which they are made; a row's last one may be its stop token.

    Rows that have ended leave the batch, and their share of the cache with them, once half of it is idle.
    """
    was_training = model.training
    model.eval()
    try:
        state = (_RunningState if _is_stateful(model) else _State).start(model, rows)
        alive = list(range(len(rows)))
        for _ in range(sampling.max_new_tokens):
            logits_BV = state.next_logits(model)
            chosen = [_choose(logits_BV[i], sampling, sources[row]) for i, row in enumerate(state.rows)]
            for row, token in zip(state.rows, chosen, strict=True):
                if row in alive:
                    yield row, token
            alive = [r for r, token in zip(state.rows, chosen, strict=True) if r in alive and token not in sampling.stop_ids]
            if not alive:
                return
            state.append(chosen, keep=alive)
    finally:
        model.train(was_training)


@dataclass
class _State:
    """A batch under way: which rows, what the model has not yet read, what it may attend to, and its cache."""

    rows: list[int]
    fresh_BT: Tensor
    seen_BT: Tensor
    cache: Any = None

    @classmethod
    def start(cls, model: Any, rows: list[list[int]]) -> _State:
        """The batch before the first token: left-padded with token 0, which `seen_BT` hides."""
        width = max(map(len, rows))
        device = model.get_input_embeddings().weight.device
        ids = [[0] * (width - len(row)) + row for row in rows]
        seen = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return cls(list(range(len(rows))), torch.tensor(ids, device=device), torch.tensor(seen, device=device))

    @torch.no_grad()
    def next_logits(self, model: Any) -> Tensor:
        """float32 (float64 for such a model) [B, V] on the CPU: logits of the next token of each row."""
        positions_BT = (self.seen_BT.cumsum(1) - 1).clamp(min=0)[:, -self.fresh_BT.shape[1] :]
        output = model(
            input_ids=self.fresh_BT,
            attention_mask=self.seen_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV.to("cpu", torch.float64 if logits_BV.dtype == torch.float64 else torch.float32)

    def append(self, chosen: list[int], *, keep: list[int]) -> None:
        """Nothing; takes in one token per row, and drops rows not in `keep` once they are half of the batch."""
        device = self.fresh_BT.device
        self.fresh_BT = torch.tensor(chosen, device=device)[:, None]
        self.seen_BT = torch.cat([self.seen_BT, self.seen_BT.new_ones(len(chosen), 1)], dim=1)
        if 2 * len(keep) <= len(self.rows):
            kept = torch.tensor([self.rows.index(row) for row in keep], device=device)
            self.fresh_BT, self.seen_BT = self.fresh_BT[kept], self.seen_BT[kept]
            self.cache.batch_select_indices(kept)
            self.rows = keep


class _RunningState(_State):
    """The same for a model that carries its state along the row: prompts of one length, no mask, and no row leaves.

    Where the architecture hands out no such state, the whole row is read again for each token: slow, and right.
    """

    @torch.no_grad()
    def next_logits(self, model: Any) -> Tensor:
        name = _cache_name(model)
        if name is None:
            output = model(input_ids=self.fresh_BT, use_cache=False)
        else:
            output = model(input_ids=self.fresh_BT, use_cache=True, **{name: self.cache})
            self.cache = getattr(output, name)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV.to("cpu", torch.float64 if logits_BV.dtype == torch.float64 else torch.float32)

    def append(self, chosen: list[int], *, keep: list[int]) -> None:
        fresh_B1 = torch.tensor(chosen, device=self.fresh_BT.device)[:, None]
        self.fresh_BT = fresh_B1 if self.cache is not None else torch.cat([self.fresh_BT, fresh_B1], dim=1)


def _is_stateful(model: Any) -> bool:
    """Whether a row's past is a state that padding would enter, as transformers says of the architecture."""
    return bool(getattr(unwrapped(model), "_is_stateful", False))


def _cache_name(model: Any) -> str | None:
    """What the model's forward calls its cache; None where it has none."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def _choose(logits_V: Tensor, sampling: _Sampling, source: torch.Generator) -> int:
    """The next token of one row: the likeliest, or one drawn from the smallest set of words holding `top_p` of the chance."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    chances_V, words_V = (logits_V / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    before_V = chances_V.cumsum(-1) - chances_V
    chances_V = chances_V.where(before_V < sampling.top_p, 0)
    return int(words_V[torch.multinomial(chances_V, 1, generator=source)])
