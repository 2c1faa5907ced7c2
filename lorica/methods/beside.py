"""What any method can train beside its own adapters: whole modules, and the rows of single tokens.

    modules_to_save     a fresh classification head, a resized embedding, norms: full fine-tuning's masters (`full.py`)
    trainable_tokens    rows of the input embedding for new tokens (`tokens.py`)

Each such module gets an adapter of its own, so that training, checkpoints, merging, detaching and saving need no
special case. A module that holds others (a head of two linear layers) is taken apart: each of its parts is wrapped.

What it gives up: modules that share a weight cannot be trained apart. Naming the embedding of a tied pair, or its head,
trains both as one weight. PEFT does so only when asked (`ensure_weight_tying`) and otherwise parts the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorica.errors import TargetError
from lorica.methods.full import FullFineTuning
from lorica.methods.method import Adapter, MethodOptions
from lorica.methods.selection import matching, no_match, read_but_not_called
from lorica.methods.tokens import TokenRows

WHOLE = FullFineTuning(targets=".*")
"""How a module is trained whole."""


@dataclass(frozen=True)
class Beside:
    """What is trained beside the adapters: the modules' names, and how to make their adapters."""

    names: Sequence[str]
    wrap: Callable[[], dict[str, Adapter]]


def resolve_beside(model: nn.Module, options: MethodOptions) -> Beside:
    """What `options.modules_to_save` and `options.trainable_tokens` mean in `model`.

    Raises:
        TargetError: patterns that match nothing, modules that cannot be trained, tokens that do not exist, and modules
            that both options name; all of them at once.
    """
    faults: list[str] = []
    modules = _whole_modules(model, options.modules_to_save, faults)
    tokens = _token_modules(model, options.trainable_tokens, faults)
    faults += [
        f"trainable_tokens: {name} is trained whole by modules_to_save, by its name or by its tie to another."
        for name in tokens
        if name in modules
    ]
    if faults:
        raise TargetError("\n".join(faults))
    return Beside(
        names=[*modules, *tokens],
        wrap=lambda: {**WHOLE.wrap_all(model, modules), **wrap_tokens(model, tokens)},
    )


def parts(model: nn.Module, name: str) -> list[str]:
    """The modules with parameters of their own in the module at `name`, itself included."""
    inside = model.get_submodule(name).named_modules(prefix=name)
    return [part for part, module in inside if any(True for _ in module.parameters(recurse=False))]


def wrap_tokens(model: nn.Module, tokens: Mapping[str, tuple[int, ...]]) -> dict[str, Adapter]:
    """Adapters for the rows of `tokens`, by module; the same rows of one weight are one parameter, saved with the first
    module.
    """
    found: dict[str, Adapter] = {}
    first: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    for name, ids in tokens.items():
        module = model.get_submodule(name)
        key = (id(module.weight), ids)
        adapter = TokenRows(tokens=ids).share(module, first.get(key))
        first[key] = adapter.rows
        found[name] = adapter
    return found


def tied_to(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The embeddings and linear layers whose weight is that of one of the modules at `names`, these included."""
    weights = {id(model.get_submodule(name).weight) for name in names}
    # A quantised weight is made anew at each look, and is nobody else's.
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and id(module._parameters.get("weight")) in weights
    ]


def input_embedding(model: nn.Module) -> str | None:
    """The name of the layer that turns token ids into vectors, where the model says which it is."""
    from transformers import PreTrainedModel

    layer = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if name and module is layer), None)


def _whole_modules(model: nn.Module, patterns: Iterable[str], faults: list[str]) -> list[str]:
    """The modules that `patterns` mean, taken apart, and those tied to them."""
    candidates = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    untrainable = set(read_but_not_called(model))
    names: dict[str, None] = {}
    for pattern in patterns:
        found = matching(pattern, candidates)
        if not found:
            faults.append(no_match("modules_to_save", pattern, model, candidates))
        for part in (part for name in found for part in parts(model, name)):
            if part in untrainable or not WHOLE.takes(model.get_submodule(part)):
                kind = type(model.get_submodule(part)).__name__
                faults.append(
                    f"modules_to_save: {pattern!r} means {part}, a {kind}, which cannot be trained whole: it holds "
                    "others, is read without being called, or has no floating-point weights. Name its parts."
                )
            else:
                names[part] = None
    return WHOLE.with_tied(model, names)


def _token_modules(
    model: nn.Module, tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]], faults: list[str]
) -> dict[str, tuple[int, ...]]:
    """The modules of which rows are trained, those tied to them included, each with its tokens."""
    candidates = [n for n, m in model.named_modules() if n and isinstance(m, nn.Embedding | nn.Linear)]
    named: dict[str, tuple[int, ...]] = {}
    if isinstance(tokens, Mapping):
        for pattern, ids in tokens.items():
            found = matching(pattern, candidates)
            if not found:
                faults.append(no_match("trainable_tokens", pattern, model, candidates))
            faults += [
                f"trainable_tokens: {name} is matched by {pattern!r} and an earlier pattern, with different tokens."
                for name in found
                if named.setdefault(name, ids) != ids
            ]
    elif tokens:
        name = input_embedding(model)
        if name is None:
            faults.append(
                f"trainable_tokens: {type(model).__name__} does not say which layer embeds its tokens; name it, as in "
                "{embed_tokens: [32000, 32001]}."
            )
        else:
            named[name] = tokens
    result: dict[str, tuple[int, ...]] = {}
    for name, ids in named.items():
        for tied in tied_to(model, [name]):
            if tied in named and named[tied] != ids and tied < name:
                faults.append(f"trainable_tokens: {tied} and {name} share one weight, but are given different tokens.")
            result[tied] = ids
        num_rows = int(model.get_submodule(name).get_parameter("weight").shape[0])
        if beyond := [token for token in ids if token >= num_rows]:
            faults.append(
                f"trainable_tokens: {', '.join(map(str, beyond[:8]))} are beyond the {num_rows:,} rows of {name}. For "
                "new tokens resize it first: model.resize_token_embeddings(len(tokenizer))."
            )
    return {name: ids for name, ids in result.items() if ids}
