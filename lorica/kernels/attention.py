"""Attention for padded and for packed batches, behind transformers' own attention interface.

A packed batch is several samples in one row with their borders in `cu_seqlens`. The samples are cut apart here, so no
attention can cross a border and no [tokens, tokens] mask exists; it works on a CPU as on CUDA. Prefix methods hand over
keys and values that stand in front of every sample: all its queries see all of them, whatever mask or window holds
among the tokens themselves.

What it gives up: attention weights are never returned.

Shapes: B batch, H heads, K key-value heads (K divides H), T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from lorica.kernels import cpu_attention, cuda_attention, one_query, torch_attention

NAME = "lorica"


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
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
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
        prefix_key, prefix_value: [K, n, D], seen by every query of every sample beside what it sees else; or neither.

    Returns:
        [B, T, H, D], and no attention weights.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_free = attention_mask is None and position_bias is None
    is_plain = not dropout and softcap is None and s_aux is None
    is_simple = is_free and is_plain and prefix_key is None
    if position_bias is None and prefix_key is None and not dropout and one_query.takes(query, key, attention_mask):
        if attention_mask is None and causal and sliding_window:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        return one_query.attend(query, key, value, attention_mask, scale=scale, softcap=softcap, sinks=s_aux), None
    if is_free and cpu_attention.takes(query, key, causal, plain=is_plain):
        out = cpu_attention.attend(
            query, key, value, scale=scale, causal=causal, cu_seqlens=cu_seq_lens_q, window=sliding_window,
            prefix_key=prefix_key, prefix_value=prefix_value, softcap=softcap, sinks=s_aux, dropout=dropout,
        )  # fmt: skip
    elif cu_seq_lens_q is not None and is_simple and cuda_attention.takes(query, key, value):
        out = cuda_attention.attend(
            query, key, value, scale=scale, causal=causal, cu_seqlens=cu_seq_lens_q, window=sliding_window
        )
    else:
        call = torch_attention.Call(
            scale, causal, dropout, sliding_window, softcap, position_bias, s_aux, prefix_key, prefix_value
        )
        out = torch_attention.attend(call, query, key, value, attention_mask, cu_seq_lens_q)
    return out.transpose(1, 2).contiguous(), None


def mask(
    *,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    use_vmap: bool = False,
    q_offset: int | Tensor = 0,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers asks for: none for plain causal attention, else [B, 1, T, Tk] of booleans.

    `local_size` is a window or a chunk (Llama 4), which are told apart by the mask alone: a row longer than that gets
    one. Packed rows, for which transformers forbids the skip, get none: `cu_seqlens` and the layer's window say it all.
    A single query, as in decoding, needs none but for padding while it sees all that the cache has kept.
    """
    if q_length == 1 and not use_vmap and not torch.is_tensor(q_offset):
        begin = kwargs.get("kv_offset", 0)
        if attention_mask is None and _sees_all(q_offset, **kwargs):
            return None
        is_known = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        if attention_mask is not None and is_known and attention_mask.shape[-1] >= begin + kv_length:
            return attention_mask[:, None, None, begin : begin + kv_length]
    plain = attention_mask is None and not use_vmap and not torch.is_tensor(q_offset) and q_offset == 0
    is_local = local_size is not None and kv_length > local_size and allow_is_causal_skip
    if plain and q_length == kv_length and not is_local:
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    result: Tensor | None = sdpa_mask(
        attention_mask=attention_mask,
        q_length=q_length,
        kv_length=kv_length,
        use_vmap=use_vmap,
        q_offset=q_offset,
        local_size=local_size,
        **kwargs,
    )
    return result


def _sees_all(
    position: int, mask_function: Callable[..., Tensor] = causal_mask_function, kv_offset: int = 0, **_: Any
) -> bool:
    """Whether the query at `position` sees every key of a row without padding.

    What it sees ends with itself and has no gap, be it a window, a chunk or everything: so the first key tells.
    """
    if mask_function is causal_mask_function:
        return True
    zero = torch.tensor(0)
    return bool(mask_function(zero, zero, torch.tensor(position), torch.tensor(kv_offset)))


def register() -> None:
    """Make `attn_implementation="lorica"` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
