"""Text from a model: many prompts at once (`generate`), or one as it comes (`stream`).

Prompts are sorted by length and padded on the left behind an attention mask; what a row of a batch gives is what it
gives alone (in float32; 16-bit sums depend on the batch's shape). A loop of our own decodes, which does nothing between
two calls of the model but take a token, and drops rows that have ended when half of a batch has. Models that cannot be
decoded so (`cache.py`) are left to transformers' `generate`, so every architecture's special ways are served. Only the
arguments here decide: sampling defaults that a base brings in its generation_config.json never leak in.

What it gives up: there is no continuous batching; and where transformers decodes, a stream comes in one piece.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lorica.errors import DataError
from lorica.evaluate.cache import plain_cache
from lorica.kernels.rows import argmax
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
    choose = _chooser(model, temperature, top_p, seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = _inputs(model, [prompts[index] for index in chosen], pad_id)
        for row, token in _tokens(model, inputs, max_new_tokens, stop_ids, pad_id, choose):
            answers[chosen[row]].append(token)
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
    model, which is in evaluation mode until then.

    Raises:
        DataError: as `generate`.
    """
    check_prompts(model, [prompt], max_new_tokens)
    pad_id = _pad_id(tokenizer, stop_ids)
    inputs, choose = _inputs(model, [prompt], pad_id), _chooser(model, temperature, top_p, seed)
    return _pieces(tokenizer, _tokens(model, inputs, max_new_tokens, stop_ids, pad_id, choose))


def _pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Generator[tuple[int, int], None, None]
) -> Generator[str, None, None]:
    with closing(tokens):
        yield from decode_pieces(tokenizer, (token for _, token in tokens))


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


_Choose = Callable[[Tensor], Tensor]


def _chooser(model: PreTrainedModel, temperature: float, top_p: float, seed: int) -> _Choose:
    """From logits [B, vocabulary] to the next ids [B]; draws come from a generator of its own."""
    if temperature <= 0:
        return lambda logits: argmax(logits.float())
    generator = torch.Generator(model.device).manual_seed(seed)
    warp = LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
    )

    def draw(logits: Tensor) -> Tensor:
        # No warper looks at the ids.
        chances = warp(None, logits.float()).softmax(-1)
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return draw


def _tokens(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    choose: _Choose,
) -> Generator[tuple[int, int], None, None]:
    """Each new token with the row of `inputs` that it belongs to; a stop id ends its row and is not given."""
    training = model.training
    model.eval()
    try:
        cache = plain_cache(model, inputs["input_ids"].shape[1] + max_new_tokens)
        if cache is None:
            yield from _by_transformers(model, inputs, max_new_tokens, stop_ids, pad_id, choose)
        else:
            yield from _decode(model, cache, inputs, max_new_tokens, stop_ids, choose)
    finally:
        model.train(training)


def _decode(
    model: PreTrainedModel,
    cache: DynamicCache,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    choose: _Choose,
) -> Generator[tuple[int, int], None, None]:
    takes = inspect.signature(model.forward).parameters
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = inputs.get("position_ids", (mask.cumsum(1) - 1).clamp(min=0))
    is_padded = not bool(mask.all())
    # The row of the inputs that stands at each place of the batch; None where it has ended.
    rows: list[int | None] = list(range(len(ids)))
    for step in range(max_new_tokens):
        given = {"position_ids": positions, "logits_to_keep": 1}
        # The mode is no longer than a call: it would hold for whoever takes the tokens too.
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=mask if is_padded else None,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in given.items() if name in takes},
            ).logits
            tokens = choose(logits[:, -1])
        for place, token in enumerate(tokens.tolist()):
            row = rows[place]
            if row is not None and token in stop_ids:
                rows[place] = None
            elif row is not None:
                yield row, token
        live = [place for place, row in enumerate(rows) if row is not None]
        if not live or step + 1 == max_new_tokens:
            return
        with torch.inference_mode():
            if 2 * len(live) <= len(rows):
                places = torch.tensor(live, device=ids.device)
                cache.batch_select_indices(places)
                tokens, mask, positions = tokens[places], mask[places], positions[places]
                is_padded = not bool(mask.all())
                rows = [rows[place] for place in live]
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if is_padded:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def _by_transformers(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    choose: _Choose,
) -> Generator[tuple[int, int], None, None]:
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=pad_id, use_cache=True
    )
    begin = inputs["input_ids"].shape[1]
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        config.decoder_start_token_id = pad_id if start is None else start
        # Its output begins with that token.
        begin = 1
    own = model.generation_config
    # transformers fills what a given config leaves open from the model's own, which may ask for sampling or penalties.
    model.generation_config = GenerationConfig(pad_token_id=pad_id)
    try:
        with torch.inference_mode():
            # Greedily, of logits in which what `choose` takes is all there is.
            output = model.generate(**inputs, generation_config=config, logits_processor=[_Chosen(choose)])
    finally:
        model.generation_config = own
    for row, ids in enumerate(output[:, begin:].tolist()):
        end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
        yield from ((row, token) for token in ids[:end])


class _Chosen(LogitsProcessor):  # type: ignore[misc]
    """Logits of which the chosen token's is the largest."""

    def __init__(self, choose: _Choose) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter_(1, self.choose(scores)[:, None], 1.0)


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
