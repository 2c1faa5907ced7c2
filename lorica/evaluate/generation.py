"""Text from a model: many prompts at once (`generate`), or one as it comes (`stream`).

Both run transformers' own `generate` with its KV cache, so every architecture's special ways are served. Prompts are
sorted by length and padded on the left behind an attention mask; what a row of a batch gives is what it gives alone (in
float32; 16-bit sums depend on the batch's shape). Only the arguments here decide: sampling defaults that a base brings
in its generation_config.json never leak in.

What it gives up: a batch runs until its longest answer is done; there is no continuous batching.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from lorica.errors import DataError
from lorica.methods.attach import in_front

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The new ids of each prompt, in the prompts' order, without the stop id that ended them.

    Args:
        prompts: token ids, each at least one; what an adapted model's method wants in front of them is put there.
        temperature: 0 takes the most probable token; above, tokens are drawn.
        top_p: draw from the most probable tokens that together reach this probability.
        seed: the same seed, prompts and batch size draw the same tokens; torch's own generators stay as they were.

    Raises:
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context. Lists them all.
    """
    check_prompts(model, prompts, max_new_tokens)
    pad_id = _pad_id(tokenizer, stop_ids)
    config = _config(max_new_tokens, stop_ids, pad_id, temperature, top_p)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with _generating(model, config, seed):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = _inputs(model, [prompts[index] for index in chosen], pad_id)
            output = model.generate(**inputs, generation_config=config)
            # An encoder-decoder's output begins with the token that its decoder starts from.
            begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            for index, row in zip(chosen, output[:, begin:].tolist(), strict=True):
                answers[index] = _until_stop(row, stop_ids)
    return answers


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generator[str, None, None]:
    """The answer to one prompt in pieces of text as they are decoded; no piece ends inside a character.

    The pieces together are the decoded result of `generate` for this prompt alone. Closing the iterator early stops the
    model after its current token.

    Raises:
        DataError: as `generate`.
    """
    check_prompts(model, [prompt], max_new_tokens)
    pad_id = _pad_id(tokenizer, stop_ids)
    config = _config(max_new_tokens, stop_ids, pad_id, temperature, top_p)
    return decode_pieces(tokenizer, _stream_ids(model, prompt, config, stop_ids, seed))


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model can attend to, prompt and answer together; None where it states no limit.

    What the method of an adapted model puts in front of them is taken off.
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids, position = in_front(model)
    return int(length) - len(ids) - position if length else None


def answer_room(model: PreTrainedModel, prompt: Sequence[int], limit: int | None) -> float:
    """Most tokens that the model can answer to `prompt` in a context of `limit`.

    An encoder-decoder reads and writes in contexts of their own.
    """
    if limit is None:
        return math.inf
    if model.config.is_encoder_decoder:
        return limit if len(prompt) <= limit else 0
    return max(0, limit - len(prompt))


def unanswerable(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Indices of the prompts that are empty, or leave no room for `max_new_tokens` in the model's context."""
    limit = context_length(model)
    rooms = [answer_room(model, prompt, limit) if prompt else 0 for prompt in prompts]
    return [index for index, room in enumerate(rooms) if room < max_new_tokens]


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, names: Sequence[str] | None = None
) -> None:
    """Raise DataError that lists every prompt that is empty or too long, by `names` or else counted from 1."""
    limit = context_length(model)
    faults = []
    for index in unanswerable(model, prompts, max_new_tokens):
        name = f"prompt {index + 1}" if names is None else names[index]
        num_tokens = len(prompts[index])
        faults.append(f"{name} has {num_tokens} tokens" if num_tokens else f"{name} is empty")
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        context = "" if limit is None else f" in the model's context of {limit}"
        raise DataError(
            f"Each prompt needs at least one token, and room for {max_new_tokens} more{context}, but {shown}. "
            f"Shorten the prompt{', or lower max_new_tokens' if max_new_tokens > 1 else ''}."
        )


def decode_pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Generator[str, None, None]:
    """Text of `ids` in pieces, each given as soon as its last character is whole.

    A byte-level vocabulary splits a character of several bytes over several tokens: until its last byte is there, it
    decodes to U+FFFD and is held back. A window of tokens is decoded together, since some tokenizers drop or add a
    space at the start.
    """

    def decode(window: list[int]) -> str:
        text = tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    given: list[int] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        before, now = decode(given), decode(given + waiting)
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            yield now[len(before) :]
            given, waiting = waiting, []
    if waiting and (rest := decode(given + waiting)[len(decode(given)) :]):
        yield rest


def _config(
    max_new_tokens: int, stop_ids: Sequence[int], pad_id: int, temperature: float, top_p: float
) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, a seeded generator and no defaults of the base's, all restored at the end."""
    training, own = model.training, model.generation_config
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        config.decoder_start_token_id = config.pad_token_id if start is None else start
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    # transformers fills what a given config leaves open from the model's own, which may ask for sampling or penalties.
    model.generation_config = GenerationConfig(pad_token_id=config.pad_token_id)
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = own
        model.train(training)


def _pad_id(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> int:
    # Padding stands behind the mask, so any id of the vocabulary serves.
    pad_id = tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else next(iter(stop_ids), 0)


def _inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids, all [B, T] int64, the prompts ending at T, or beginning at 0 where an
    encoder reads them.

    Each is behind what the model's method wants there; transformers counts on from the last position.
    """
    ids, position = in_front(model)
    rows = [[*ids, *prompt] for prompt in prompts]
    width = max(len(row) for row in rows)
    filled = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    if model.config.is_encoder_decoder:
        order = mask.argsort(dim=1, descending=True, stable=True)
        filled, mask = filled.gather(1, order), mask.gather(1, order)
    inputs = {"input_ids": filled, "attention_mask": mask}
    # Not every model takes positions; all that need them moved do.
    return {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0) + position} if position else inputs


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


class _Ids:
    """What `generate` takes as a streamer: hands each new token to another thread."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        # The prompt comes first.
        if self.prompt_seen:
            self.queue.put(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        self.queue.put(None)


def _stream_ids(
    model: PreTrainedModel, prompt: Sequence[int], config: GenerationConfig, stop_ids: Sequence[int], seed: int
) -> Iterator[int]:
    """New ids as `generate`, running in a thread of its own, finds them."""
    inputs = _inputs(model, [prompt], config.pad_token_id)
    ids, closed = _Ids(), threading.Event()

    def is_closed(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            with _generating(model, config, seed):
                model.generate(
                    **inputs,
                    generation_config=config,
                    streamer=ids,
                    stopping_criteria=StoppingCriteriaList([is_closed]),
                )
        except BaseException as error:
            # Raised again where the answer is read: an error in a thread would only be printed.
            ids.queue.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (item := ids.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item in stop_ids:
                return
            yield item
    finally:
        closed.set()
        worker.join()
