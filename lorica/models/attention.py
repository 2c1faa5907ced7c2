"""Attention for padded and for packed batches, behind transformers' own attention interface.

A packed batch is several samples in one row with their borders in `cu_seqlens`. The samples are cut apart here, so no
attention can cross a border, no [tokens, tokens] mask exists, and no padding is computed; it works on a CPU as on CUDA.
Whether a model hands `cu_seqlens` to every one of its layers is not guessed from its name: `packing_support` runs the
architecture on fake tensors, which have no memory, with a function that records what arrives.

What it gives up: a packed batch costs one kernel call a sample (runs of equal length share one).

Shapes: B batch, H heads, K key-value heads (K divides H), T tokens, D head size.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lorica"
_RECORDER = "lorica_recorder"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        query: [B, H, T, D]; key, value: [B, K, Tk, D], not repeated.
        attention_mask: [B, 1, T, Tk], True where a query may look, or None.
        sliding_window: a query sees this many positions, itself included. A mask that came has it already.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        position_bias: added to the scores, [1 or B, H, T, Tk] (T5).
        s_aux: one logit a head that takes part in the softmax and has no value (gpt-oss "sinks"), [H].
        cu_seq_lens_q: [samples + 1] borders of the packed samples; B is 1 then.

    Returns:
        [B, T, H, D], and no attention weights.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None and position_bias is None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and causal and sliding_window is not None and k.shape[2] > sliding_window:
            mask = _band(q.shape[2], k.shape[2], sliding_window, q.device)
        if plain:
            return _sdpa(q, k, v, mask, scale, dropout, causal)
        return _explicit(q, k, v, mask, scale, dropout, causal, softcap, position_bias, s_aux)

    if cu_seq_lens_q is None:
        out = attend(query, key, value, attention_mask)
    else:
        out = _packed(attend, query, key, value, _lengths(cu_seq_lens_q))
    return out.transpose(1, 2).contiguous(), None


def mask(
    *,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    use_vmap: bool = False,
    q_offset: int | Tensor = 0,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers asks for: none for plain causal attention, else [B, 1, T, Tk] of booleans."""
    plain = attention_mask is None and not use_vmap and not torch.is_tensor(q_offset) and q_offset == 0
    if plain and q_length == kv_length:
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    result: Tensor | None = sdpa_mask(
        attention_mask=attention_mask,
        q_length=q_length,
        kv_length=kv_length,
        use_vmap=use_vmap,
        q_offset=q_offset,
        **kwargs,
    )
    return result


def _packed(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"cu_seqlens cover {sum(lengths)} tokens, but the packed batch has {query.shape[2]}.")
    # Runs of equal length become one batch; `split` and `cat` are each other's backward, so nothing is gathered.
    runs = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = []
    for (length, count), q, k, v in zip(runs, *(t.split(sizes, dim=2) for t in (query, key, value)), strict=True):
        out = attend(*(_fold(t, count, length) for t in (q, k, v)), None)
        parts.append(out.transpose(0, 1).reshape(1, out.shape[1], count * length, out.shape[3]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _fold(t: Tensor, count: int, length: int) -> Tensor:
    """[1, H, count * length, D] -> [count, H, length, D] without a copy."""
    return t.unflatten(2, (count, length)).squeeze(0).transpose(0, 1)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    borders = cu_seqlens.detach().cpu().numpy()
    return [int(n) for n in borders[1:] - borders[:-1]]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, causal: bool) -> Tensor:
    causal = causal and mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=grouped
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    softcap: float | None,
    position_bias: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The formula itself, for what the fused kernels do not know: soft-capping, sinks, position biases."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and causal and q.shape[2] > 1:
        mask = _band(q.shape[2], k.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), dropout, training=dropout > 0) @ v


def _band(q_length: int, kv_length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, Tk]: True where a query sees a key, itself and the window - 1 positions before it."""
    behind = torch.arange(q_length, device=device)[:, None] + (kv_length - q_length) - torch.arange(kv_length, device=device)
    return ((behind >= 0) & (behind < window))[None, None]


def packing_support(config: PretrainedConfig) -> str | None:
    """None if this architecture can train on packed batches with our attention; else the reason why not.

    The architecture runs once on fake tensors (no weights, tens of milliseconds) with an attention function that only
    records: every layer must call it, hand over `cu_seqlens`, and hand over its sliding window where the config has one.
    """
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, query: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(kwargs)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_RECORDER, record)
    AttentionMaskInterface.register(_RECORDER, mask)
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 3, "max_length_k": 3}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=_RECORDER, dtype=torch.bfloat16
            )
            ids = torch.zeros(1, 5, dtype=torch.long)
            model.eval()(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, **packed)
    except Exception as error:
        # An architecture fails here in whatever way it likes; the reason is shown, and padded batches always work.
        return f"it does not run with a custom attention function ({type(error).__name__}: {str(error)[:120]})"
    return _missing(calls, config)


def _missing(calls: list[dict[str, Any]], config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    if len(calls) != num_layers:
        return f"{len(calls)} of its {num_layers} layers use the attention interface"
    if not all(torch.is_tensor(call.get("cu_seq_lens_q")) for call in calls):
        return "its layers do not hand over the borders of packed samples"
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if kinds is not None:
        want = sum(kind == "sliding_attention" for kind in kinds)
    else:
        want = num_layers if window else 0
    if sum(call.get("sliding_window") is not None for call in calls) < want:
        return "its layers do not hand over their sliding window"
    return None


def register() -> None:
    """Make `attn_implementation="lorica"` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
