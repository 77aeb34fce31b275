"""A conversation with a tuned model: its own template, its own stops, the answer streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tutelage.errors import ModelError

LEAVE = ("/exit", "/quit")


@dataclass
class Session:
    """A loaded model and what has been said so far."""

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    temperature: float
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)


def open_session(folder: Path, *, system: str | None, temperature: float, max_new_tokens: int) -> Session:
    """A session with the model in `folder` (a model folder, or a run folder that holds `model/`)."""
    from tutelage.model import choose_device, choose_dtype, describe, load_model, load_tokenizer

    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; `tutelage run RECIPE` leaves one in runs/NAME/model")
    device = choose_device()
    dtype, _ = choose_dtype(device)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template, so it is not known how to talk to this model")
    session = Session(
        load_model(folder, dtype=dtype, device=device), tokenizer, tuple(describe(folder).end_ids), temperature, max_new_tokens
    )
    if system is not None:
        session.messages.append({"role": "system", "content": system})
    return session


def answer(session: Session, text: str) -> Iterator[str]:
    """Pieces of the model's answer to `text`; both are remembered once the answer is complete."""
    from tutelage.model import stream

    asked = [*session.messages, {"role": "user", "content": text}]
    prompt = session.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    pieces: list[str] = []
    for piece in stream(
        session.model,
        session.tokenizer,
        prompt,
        max_new_tokens=session.max_new_tokens,
        stop_ids=session.stop_ids,
        temperature=session.temperature,
    ):
        pieces.append(piece)
        yield piece
    session.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def say(session: Session, text: str, out: TextIO) -> None:
    """Prints the answer to `text` as it comes."""
    for piece in answer(session, text):
        out.write(piece)
        out.flush()
    out.write("\n")


def loop(session: Session, lines: TextIO, out: TextIO) -> None:
    """Answers line after line until the input ends or says /exit; /new forgets what was said, but for the system prompt."""
    out.write("/new starts afresh, /exit leaves\n")
    while True:
        out.write("> ")
        out.flush()
        text = lines.readline()
        if not text or text.strip() in LEAVE:
            return
        if text.strip() == "/new":
            session.messages = [m for m in session.messages if m["role"] == "system"]
        elif text.strip():
            say(session, text.strip(), out)
