"""`lorica generate` and `lorica chat`: answers from a base or from an adapted model.

One prompt is answered as text, on a terminal word by word; a file of prompts as JSON lines, in the file's order. `chat`
keeps the conversation and drops its oldest turns when the model's context is full.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.data.readers import READERS
from lorica.data.rows import Message, RowError, RowFault, list_faults
from lorica.data.turns import parse_turns, text_of
from lorica.errors import ConfigError, DataError
from lorica.evaluate.compact import compact
from lorica.evaluate.generation import answer_room, check_prompts, context_length, stream
from lorica.evaluate.generation import generate as generate_ids
from lorica.models.tasks import CLASSIFICATION
from lorica.quant.head import quantize_head
from lorica.recipes import console
from lorica.recipes.classify import Prediction, predict, read_texts, text_example
from lorica.recipes.opening import Source, find_source, open_model
from lorica.recipes.tasks import TextRenderer, answering

BATCH_SIZE = 16
MAX_NEW_TOKENS = 256
"""Longest answer where nobody asked for another; shorter where the model's context leaves less."""

Conversation = list[Message]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt (the last turn of its conversation) and what the model said."""

    prompt: str
    response: str


def generate(
    run_or_base: str | Path,
    overrides: Sequence[str] = (),
    *,
    prompt: str | None = None,
    input: str | Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    base_only: bool = False,
    quant_head: str | None = None,
) -> list[Answer] | list[Prediction]:
    """Answer prompts, print the answers on stdout and return them.

    Args:
        run_or_base: a run folder, an adapter folder, a model folder, a hub id, or `"embedded"`.
        overrides: `section.key=value`, on top of the run's config.yaml; of the section `model` where there is none.
        prompt: one prompt. Without it and `input`, all of stdin is one prompt.
        input: a .txt file with a prompt a line; or rows (.jsonl, .json, .csv, .parquet) with a column `prompt`, or
            `messages`, whose last assistant turn is left out when it ends the conversation.
        max_new_tokens: longest answer; None: `MAX_NEW_TOKENS`, or what the prompt leaves of the model's context.
        temperature: 0 takes the most probable token.
        quant_head: quantise the output head, int8 or nf4: answers come faster and differ a little (quant/head.py).

    Raises:
        ConfigError: both `prompt` and `input`, or neither and stdin is a terminal; or a head that cannot be quantised.
        DataError: prompts that cannot be read, or leave no room for an answer (for one of `max_new_tokens`, where that
            is given); all of them are listed.
    """
    source = find_source(run_or_base, overrides)
    if source.task().task is CLASSIFICATION:
        return _classify(source, prompt, input)
    conversations = _read_prompts(prompt, input)
    model, tokenizer, renderer = _open(run_or_base, overrides, base_only, quant_head)
    prompts, names = _render(conversations, renderer), [origin for origin, _ in conversations]
    check_prompts(model, prompts, 1 if max_new_tokens is None else max_new_tokens, names)
    rooms = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    if max_new_tokens is None and min(rooms) < MAX_NEW_TOKENS:
        num_short = sum(room < MAX_NEW_TOKENS for room in rooms)
        console.log(
            f"The model's context leaves {num_short:,} of {len(rooms):,} answers less room than the usual "
            f"{MAX_NEW_TOKENS} tokens, the shortest {min(rooms)}."
        )
    how = {"stop_ids": renderer.stop_ids, "temperature": temperature, "top_p": top_p, "seed": seed}
    if input is None and sys.stdout.isatty():
        texts = [_show_stream(model, tokenizer, prompts[0], {**how, "max_new_tokens": rooms[0]})]
    else:
        texts = _answer_all(model, tokenizer, prompts, rooms, how)
    answers = [
        Answer(conversation[-1].content, text) for (_, conversation), text in zip(conversations, texts, strict=True)
    ]
    if input is not None:
        for answer in answers:
            console.print_json(answer, indent=None)
    elif not sys.stdout.isatty():
        print(answers[0].response)
    return answers


def chat(
    run_or_base: str | Path,
    overrides: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    base_only: bool = False,
    quant_head: str | None = None,
) -> list[Answer]:
    """Talk in the terminal until /exit, Ctrl-D or Ctrl-C; /reset forgets the conversation, Ctrl-C cuts an answer short.

    Args:
        overrides: as `generate` takes them.
        max_new_tokens: longest answer; None: `MAX_NEW_TOKENS`, or what a single long message leaves of the context.
        quant_head: as `generate` takes it.

    Returns:
        Every answer of the session that was not cut short.
    """
    model, tokenizer, renderer = _open(run_or_base, overrides, base_only, quant_head)
    console.log("Type a message. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short.")
    history: Conversation = []
    answers: list[Answer] = []
    while (line := _ask()) is not None:
        if line == "/reset":
            history = []
            console.log("The conversation is forgotten.")
        elif line.startswith("/"):
            console.log(f"There is no command {line}; there are /reset and /exit.")
        elif line:
            turns, prompt = _fit([*history, Message("user", line)], model, renderer, max_new_tokens)
            if prompt is None:
                continue
            how = {
                "max_new_tokens": _room(model, prompt, max_new_tokens),
                "stop_ids": renderer.stop_ids,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed + len(answers),
            }
            try:
                text = _show_stream(model, tokenizer, prompt, how)
            except KeyboardInterrupt:
                console.log("(cut short; this turn is forgotten)")
                continue
            history = [*turns, Message("assistant", text)]
            answers.append(Answer(line, text))
    return answers


def _open(
    run_or_base: str | Path, overrides: Sequence[str], base_only: bool, quant_head: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TextRenderer]:
    """The model that answers, and what speaks to it."""
    model, tokenizer, renderer = open_model(run_or_base, overrides, base_only=base_only)
    if quant_head is not None:
        quantize_head(model, quant_head)
    return compact(model), tokenizer, answering(renderer)


def _classify(source: Source, prompt: str | None, input: str | Path | None) -> list[Prediction]:
    """What a classifier says of the prompt, or of every row of a file."""
    if prompt is None and input is not None:
        return predict(source, read_texts(input, source.run.data.columns), as_lines=True)
    (origin, conversation), *_ = _read_prompts(prompt, input)
    return predict(source, [text_example(conversation[-1].content, origin)], as_lines=False)


def _ask() -> str | None:
    """The next line, stripped, or None to leave."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() a line editor
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/exit" else line


def _room(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int | None) -> int:
    """Most tokens of the answer to `prompt`: what was asked for, or else what is usual and fits."""
    if max_new_tokens is not None:
        return max_new_tokens
    return int(min(MAX_NEW_TOKENS, answer_room(model, prompt, context_length(model))))


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    how: Mapping[str, Any],
) -> list[str]:
    """The answer to each prompt, of at most as many tokens as its room; those of equal room are batched."""
    texts = [""] * len(prompts)
    for room in sorted(set(rooms)):
        chosen = [index for index, own in enumerate(rooms) if own == room]
        batch = [prompts[index] for index in chosen]
        found = generate_ids(model, tokenizer, batch, max_new_tokens=room, batch_size=BATCH_SIZE, **how)
        for index, ids in zip(chosen, found, strict=True):
            texts[index] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def _fit(
    turns: Conversation, model: PreTrainedModel, renderer: TextRenderer, max_new_tokens: int | None
) -> tuple[Conversation, list[int] | None]:
    """The newest turns that leave room for an answer, and their ids; None where not even the last one does."""
    limit = context_length(model)
    wanted, least = (MAX_NEW_TOKENS, 1) if max_new_tokens is None else (max_new_tokens, max_new_tokens)
    num_dropped = 0
    while True:
        prompt = _render([("this conversation", turns)], renderer)[0]
        # Turns are forgotten for an answer of full length; for the last one's sake the answer may be shorter.
        if answer_room(model, prompt, limit) >= (wanted if len(turns) > 1 else least):
            break
        if len(turns) == 1:
            console.log(
                f"The message has {len(prompt)} tokens; with {least} for the answer that is more than the model's "
                f"context of {limit}. Shorten it{', or lower --max-new-tokens' if least > 1 else ''}."
            )
            return turns, None
        # A question and its answer go together.
        num_dropped += 2
        turns = turns[2:]
    if num_dropped:
        console.log(f"(the context is full: the oldest {num_dropped} turns are forgotten)")
    return turns, prompt


def _show_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], how: Mapping[str, Any]
) -> str:
    """Print the answer to one prompt as it comes; its text."""
    text = ""
    pieces = stream(model, tokenizer, prompt, **how)
    with contextlib.closing(pieces):
        try:
            for piece in pieces:
                text += piece
                print(console.printable(piece), end="", flush=True)
        finally:
            # After a Ctrl-C too, so that what is said next has a line of its own.
            print()
    return text


def _render(conversations: Sequence[tuple[str, Conversation]], renderer: TextRenderer) -> list[list[int]]:
    prompts: list[list[int]] = []
    faults: list[RowFault] = []
    for origin, conversation in conversations:
        try:
            prompts.append(renderer.chat_prompt_ids(conversation))
        except RowError as error:
            faults.append(error.at(origin))
    _refuse(faults)
    return prompts


def _read_prompts(prompt: str | None, input: str | Path | None) -> list[tuple[str, Conversation]]:
    """Each prompt's origin and conversation."""
    if prompt is not None and input is not None:
        raise ConfigError("Give a prompt or a file of prompts, not both.")
    if input is not None:
        return _read_file(Path(input))
    # None where the parent closed it.
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError("There is no prompt. Give --prompt TEXT or --input FILE, or pipe a prompt in.")
    origin = "stdin" if prompt is None else "the prompt"
    text = sys.stdin.read() if prompt is None else prompt
    try:
        return [(origin, [Message("user", text_of(text.strip(), origin))])]
    except RowError as error:
        raise DataError(f"{error.reason}.") from None


def _read_file(path: Path) -> list[tuple[str, Conversation]]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    if path.suffix != ".txt" and path.suffix not in READERS:
        raise DataError(f"{path}: files of prompts end in .txt, {', '.join(READERS)}, not {path.suffix or 'nothing'}.")
    rows = _text_lines(path) if path.suffix == ".txt" else list(READERS[path.suffix](path))
    conversations: list[tuple[str, Conversation]] = []
    faults: list[RowFault] = []
    for number, row in rows:
        origin = f"{path.name}:{number}"
        try:
            conversations.append((origin, _conversation(row)))
        except RowError as error:
            faults.append(error.at(origin))
    _refuse(faults)
    if not conversations:
        raise DataError(f"{path}: holds no prompts.")
    return conversations


def _text_lines(path: Path) -> list[tuple[int, Mapping[str, Any] | RowError]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}.") from None
    return [(number, {"prompt": line}) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _conversation(row: Mapping[str, Any] | RowError) -> Conversation:
    if isinstance(row, RowError):
        raise row
    if row.get("messages") is not None:
        turns = parse_turns(row["messages"], "messages")
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns:
            raise RowError("empty", "messages holds nothing to answer")
        return turns
    if row.get("prompt") is None:
        found = ", ".join(row) or "nothing"
        raise RowError("columns", f"neither prompt nor messages, but {found}")
    return [Message("user", text_of(row["prompt"], "prompt").strip())]


def _refuse(faults: Sequence[RowFault]) -> None:
    if faults:
        raise DataError(f"{len(faults)} prompts cannot be used:\n{list_faults(faults)}")
