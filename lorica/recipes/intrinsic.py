"""The intrinsic components of a run's rows: what `num_heads: auto`, `init: components` and `components: PATH` ask for.

They are found in the training rows, by the text that `lorica components` takes, or read from the file that it wrote;
then every row is assigned to one. Which row belongs where is nothing that a later step may change, so the run keeps
them as `components.json`, and a resumed run reads that.

What it gives up: two runs on other rows number their components differently; name one file for both to compare them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from lorica.config import RunConfig
from lorica.data.clustering import Floats, Ints
from lorica.data.components import Components, Encode, find_components
from lorica.data.sampler import Order
from lorica.errors import ConfigError, DataError
from lorica.files import write_text
from lorica.methods.hydra import AUTO, COMPONENTS, HydraLoRA
from lorica.methods.method import MethodOptions
from lorica.recipes import console
from lorica.recipes.components import hidden_states, text_of
from lorica.recipes.preparing import PreparedRun

FILE = "components.json"
SHOWN_TERMS = 6

ASSUMED_HEADS = 4
"""For `auto` where the rows are not at hand."""


@dataclass(frozen=True)
class Intrinsic:
    """The components of a run's rows.

    Attributes:
        train: [training rows] int64, of each row its component, -1 for none.
        eval: [evaluation rows] likewise; None where there are none.
    """

    components: Components
    train: Ints
    eval: Ints | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have the same."""
        text = self.components.to_json()
        return {"num": self.components.num, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def save(self, folder: Path) -> None:
        """Write `components.json` into the run folder."""
        write_text(folder / FILE, self.components.to_json() + "\n")


def wants_components(options: MethodOptions) -> bool:
    """Whether a run of this method needs to know the components of its rows."""
    if not isinstance(options, HydraLoRA) or options.num_heads == 1:
        return False
    return options.num_heads == AUTO or options.init == COMPONENTS or options.components is not None


def find_intrinsic(config: RunConfig, data: PreparedRun, saved: Path | None = None) -> Intrinsic | None:
    """The components of the rows of `data`, said aloud; None where the method does not ask for them.

    Args:
        saved: the `components.json` of a run that goes on. Where it is there, nothing else is looked for.

    Raises:
        ConfigError: their number is not that of the heads that should start from them.
        DataError: a file holds no components, or the rows have fewer than there are heads.
    """
    options: HydraLoRA = config.method
    if not wants_components(options):
        return None
    texts = [text_of(example) for example in data.train_examples]
    path = saved if saved is not None and saved.is_file() else options.components
    if path is None:
        found = _find(texts, options.num_heads if isinstance(options.num_heads, int) else None)
        train, encode = found.labels, None
    else:
        found = read_components(Path(path))
        encode = _encoder(config, found)
        train = found.assign(texts, encode)
    _check_heads(options, found.num, path)
    evaluation = None if data.eval is None else found.assign([text_of(row) for row in data.eval_examples], encode)
    _say(found, train, options)
    return Intrinsic(found, train, evaluation)


def with_heads(options: MethodOptions, num: int) -> MethodOptions:
    """The options as they are attached: `num` heads for `auto`, and no file named that was read already."""
    if not isinstance(options, HydraLoRA):
        return options
    return replace(options, num_heads=num if options.num_heads == AUTO else options.num_heads, components=None)


def first_rows(intrinsic: Intrinsic, order: Order, lengths: Ints, num_tokens: int) -> list[tuple[Ints, int]]:
    """For each component its first training rows, in the run's order, of `num_tokens` tokens at least, and its number.

    Those that the run never comes to, being stopped early, follow behind in the file's order.

    Raises:
        DataError: one has none.
    """
    steps = takewhile(lambda step: order.epoch(step) < 1, range(order.num_steps))
    seen = np.concatenate([order.batch(step) for step in steps])
    rows = np.concatenate([seen, np.setdiff1d(np.arange(len(lengths)), seen)])
    parts = []
    for component in range(intrinsic.components.num):
        own = rows[intrinsic.train[rows] == component]
        if not len(own):
            raise DataError(
                f"init components: no training row is of component {component} of {intrinsic.components.num}, so no "
                "head can start from it. Leave out method.components, or find them in these rows."
            )
        parts.append((own[: 1 + int(np.searchsorted(lengths[own].cumsum(), num_tokens))], component))
    return parts


def read_components(path: Path) -> Components:
    """What `lorica components` wrote to `path`.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        return Components.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(
            f"method.components: {path}: {error} `lorica components ROWS --output FOLDER` writes such a file."
        ) from None


def _find(texts: Sequence[str], num: int | None) -> Components:
    try:
        return find_components(texts, num=num)
    except DataError as error:
        raise DataError(f"method.num_heads: one for each component of the training rows: {error}") from None


def _encoder(config: RunConfig, found: Components) -> Encode | None:
    """What gives rows the features that `found` was found with: the run's base, or None for words."""
    if found.settings["features"] == "tfidf":
        return None
    encode, width = hidden_states(config), len(found.shape)

    def checked(texts: Sequence[str]) -> Floats:
        features = encode(texts)
        if features.shape[1] != width:
            raise ConfigError(
                f"method.components: they were found with the {width} features of another base; "
                f"{config.model.base} has {features.shape[1]}. Find them with this base, or with --features tfidf."
            )
        return features

    return checked


def _check_heads(options: HydraLoRA, num: int, path: str | Path | None) -> None:
    if options.init == COMPONENTS and options.num_heads not in (AUTO, num):
        raise ConfigError(
            f"method.num_heads is {options.num_heads}, and {path} has {_number(num, 'component')}: init components "
            "starts each head from one of them. Set method.num_heads=auto, or leave out method.components."
        )


def _say(found: Components, train: Ints, options: HydraLoRA) -> None:
    heads = options.num_heads if isinstance(options.num_heads, int) else found.num
    one = " is plain LoRA" if heads == 1 else ""
    console.log(f"{_number(found.num, 'component')} in {_number(len(train), 'row')}: {_number(heads, 'head')}{one}")
    for component, terms in enumerate(found.terms):
        size = _number(int((train == component).sum()), "row")
        console.log(f"  {component}: {size}: {', '.join(terms[:SHOWN_TERMS])}")
    if num_noise := int((train < 0).sum()):
        console.log(f"  {_number(num_noise, 'row')} in none")


def _number(num: int, what: str) -> str:
    return f"{num:,} {what}" if num == 1 else f"{num:,} {what}s"
