"""Which architectures can train on packed batches with our attention: asked of the architecture, not of its name.

`packing_support` runs it without weights, on tensors that have shapes but no contents, with an attention function that
records what arrives. Ids, positions and borders are real, so what an architecture decides by them it decides as it does
in training. (torch's `FakeTensorMode` can do less and takes two to three times as long.)

Of a classifier only the body is asked; `classifier.py` shows its head rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from lorica.kernels.attention import mask
from lorica.models.classifier import layers_of
from lorica.models.tasks import CAUSAL, Task

_RECORDER = "lorica_recorder"


def packing_support(config: PretrainedConfig, task: Task = CAUSAL) -> str | None:
    """None if this architecture can train for `task` on packed batches with our attention; else the reason why not.

    The architecture runs once without weights (tens of milliseconds) with an attention function that only records:
    every layer must call it, hand over `cu_seqlens`, and hand over its sliding window where the config has one. A
    classifier's layers must follow one another, and what looks both ways must say so and have no window.
    """
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, query: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append({**kwargs, "is_causal": getattr(module, "is_causal", None)})
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_RECORDER, record)
    AttentionMaskInterface.register(_RECORDER, mask)
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 3, "max_length_k": 3}
    ids, positions = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1]])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                model = task.auto.from_config(
                    copy.deepcopy(config), attn_implementation=_RECORDER, dtype=torch.bfloat16
                ).eval()
            asked = model if task is CAUSAL else model.base_model
            with _Weightless():  # type: ignore[no-untyped-call]
                asked(input_ids=ids, position_ids=positions, use_cache=False, **packed)
    except Exception as error:
        # An architecture fails here in whatever way it likes; the reason is shown, and padded batches always work.
        return f"it does not run with a custom attention function ({type(error).__name__}: {str(error)[:120]})"
    return _missing(calls, config) or (None if task is CAUSAL else _unfit_for_rows(calls, len(layers_of(model))))


class _Weightless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A tensor without contents takes all that it meets, and where it is to go, to the meta device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            if not all(tensor.is_meta for tensor in tensors):
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _unfit_for_rows(calls: list[dict[str, Any]], num_layers: int) -> str | None:
    """Why a classifier cannot pack though its attention could."""
    if num_layers != len(calls):
        return f"its {len(calls)} calls of attention come from {num_layers} layers"
    if any(call["is_causal"] is None for call in calls):
        return "its layers do not say whether they look both ways"
    if any(not call["is_causal"] and call.get("sliding_window") is not None for call in calls):
        return "its layers look both ways through a window"
    return None


def _missing(calls: list[dict[str, Any]], config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    if len(calls) != num_layers:
        return f"{len(calls)} of its {num_layers} layers use the attention interface"
    if not all(torch.is_tensor(call.get("cu_seq_lens_q")) for call in calls):
        return "its layers do not hand over the borders of packed samples"
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and "chunked_attention" in kinds:
        return "it attends in chunks, which its layers do not hand over"
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if kinds is not None:
        want = sum(kind == "sliding_attention" for kind in kinds)
    else:
        want = num_layers if window else 0
    if sum(call.get("sliding_window") is not None for call in calls) < want:
        return "its layers do not hand over their sliding window"
    return None
