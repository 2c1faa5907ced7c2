"""Which modules of a model a pattern means, and what to say where it means none.

A pattern is a regular expression for a module's whole dotted name, or for a whole tail of it after a dot.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from lorica.errors import TargetError
from lorica.methods.method import MethodOptions

ALL_LINEAR = "all-linear"


def resolve_targets(model: nn.Module, options: MethodOptions, beside: Collection[str] = ()) -> list[str]:
    """The names of the modules that `options.targets` selects, in the model's order.

    Args:
        beside: modules that are trained otherwise; a keyword such as all-linear leaves them out.

    Raises:
        TargetError: for every pattern that matches nothing that can be wrapped, or a module of `beside`.
    """
    candidates = options.candidates(model)
    for name in (*read_but_not_called(model), *_linear_in_name_only(options, candidates)):
        candidates.pop(name, None)
    targets = options.patterns()
    patterns = (targets,) if isinstance(targets, str) else targets
    matches = {
        pattern: _all_linear(model, options, candidates, beside)
        if pattern == ALL_LINEAR
        else matching(pattern, candidates)
        for pattern in patterns
    }
    faults = [no_match("targets", p, model, candidates) for p, found in matches.items() if not found]
    is_keyword = targets != options.targets
    if faults and is_keyword:
        tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})[:12]
        raise TargetError(
            f"targets: {type(model).__name__} has nothing of what {options.targets!r} stands for. "
            f"Names that can be given: {', '.join(tails) or 'none'}."
        )
    for pattern, found in matches.items():
        # What a keyword means leaves out what is trained otherwise; a name that is given does not.
        clash = [n for n in found for other in beside if other.startswith(f"{n}.") or (n == other and not is_keyword)]
        if clash:
            faults.append(
                f"targets: {pattern!r} matches {clash[0]}, of which modules_to_save or trainable_tokens trains all or "
                "a part, by name or by a tie to another module. A module is adapted or trained beside that, not both."
            )
    if faults or not patterns:
        raise TargetError("\n".join(faults) or "targets: the list is empty; name at least one module, or all-linear.")
    chosen = {name for found in matches.values() for name in found if name not in beside}
    if not chosen:
        raise TargetError(f"targets {options.targets!r}: all of it is trained by modules_to_save or trainable_tokens.")
    return [name for name in candidates if name in chosen]


def _all_linear(
    model: nn.Module, options: MethodOptions, candidates: Mapping[str, nn.Module], beside: Collection[str]
) -> list[str]:
    head = _output_head(model)
    names = [
        name
        for name, module in candidates.items()
        if isinstance(module, options.linear_kinds) and module is not head and name not in beside
    ]
    if not names:
        raise TargetError(
            f"targets all-linear: {type(model).__name__} holds no linear layer that an adapter can wrap, its output "
            f"head {'and what is trained beside the adapters ' if beside else ''}left out."
        )
    return names


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that `pattern` matches."""
    expression = re.compile(rf"(.*\.)?({pattern})")
    return [name for name in names if expression.fullmatch(name)]


def no_match(option: str, pattern: str, model: nn.Module, candidates: Iterable[str]) -> str:
    """What to say of a pattern of `option` that matches none of the modules `candidates`."""
    everything = dict(model.named_modules())
    unsupported = matching(pattern, [n for n in everything if n])
    if unsupported:
        kind = type(everything[unsupported[0]]).__name__
        what = "wrapped by this method" if option == "targets" else "trained by it"
        return f"{option}: {pattern!r} matches {unsupported[0]}, but a {kind} there cannot be {what}."
    tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], tails, n=3, cutoff=0.5) or tails[:12]
    return f"{option}: {pattern!r} matches no module of {type(model).__name__}. Nearest names: {', '.join(near)}."


def read_but_not_called(model: nn.Module) -> list[str]:
    """Layers whose weights torch's own modules read without calling them: an adapter there would never run.

    nn.TransformerEncoderLayer does so in evaluation only, on its fast path.
    """
    parts = ((nn.MultiheadAttention, ("out_proj",)), (nn.TransformerEncoderLayer, ("linear1", "linear2")))
    return [
        f"{name}.{child}".removeprefix(".")
        for name, module in model.named_modules()
        for kind, children in parts
        if isinstance(module, kind)
        for child in children
    ]


def _linear_in_name_only(options: MethodOptions, candidates: Mapping[str, nn.Module]) -> list[str]:
    """Layers made from nn.Linear that give something else than a row for each row, as the router of Llama 4 does.

    A class that has a `forward` of its own is tried once, for some are linear all the same. Methods that take every
    module call it as it is.
    """
    if nn.Module in options.other_kinds:
        return []
    is_linear: dict[type[nn.Module], bool] = {}
    for module in candidates.values():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward and kind not in is_linear:
            is_linear[kind] = kind.__module__.startswith("lorica.") or _gives_rows(module)
    return [name for name, module in candidates.items() if not is_linear.get(type(module), True)]


def _gives_rows(layer: nn.Linear) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            out: object = layer.forward(layer.weight.new_zeros(2, layer.in_features))
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
    return isinstance(out, torch.Tensor) and out.shape == (2, layer.out_features)


def _output_head(model: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
