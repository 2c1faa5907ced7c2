"""What packed attention on CUDA is called with, and when: by a stand-in for torch's kernel, since most machines have no
GPU; and the kernel itself against float64 where there is one.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.kernels import cuda_attention
from lorica.kernels.attention import attention

CUTS = (0, 5, 6, 20, 31)


def varlen_in_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn by its documentation: [T, H, D], and how many may be seen on both sides."""
    assert cu_q.dtype is cu_k.dtype is torch.int32 and cu_q.device == q.device
    ends = cu_q.tolist()
    assert max_q == max_k == max(b - a for a, b in pairwise(ends)) and enable_gqa == (q.shape[1] != k.shape[1])
    assert all(t.stride(2) == 1 for t in (q, k, v))
    before, after = (10**9 if side == -1 else side for side in window_size)
    parts = []
    for begin, end in pairwise(ends):
        at = torch.arange(end - begin, device=q.device)
        distance = at[:, None] - at[None]
        sees = (distance <= before) & (-distance <= after)
        keys, values = (t[begin:end].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
        scores = (q[begin:end].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


def inputs(key_heads: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    rows = (torch.randn(1, CUTS[-1], heads, size, dtype=dtype) for heads in (4, key_heads, key_heads))
    return [t.to(device).transpose(1, 2).requires_grad_() for t in rows]


class Layer(nn.Module):
    is_causal = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As on CUDA, with the stand-in for torch's kernel, whose keywords are recorded."""
    seen: list[dict[str, Any]] = []

    def stand_in(*tensors: Any, **arguments: Any) -> Tensor:
        seen.append(arguments)
        return varlen_in_torch(*tensors, **arguments)

    monkeypatch.setattr(cuda_attention, "takes", lambda *_: True)
    monkeypatch.setattr(cuda_attention, "_varlen_attn", lambda: stand_in)
    # Or the CPU's own comes first.
    monkeypatch.setattr("lorica.kernels.cpu_attention.takes", lambda *_, **__: False)
    return seen


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("window", "causal", "sides"),
    [(None, True, (-1, 0)), (3, True, (2, 0)), (14, True, (-1, 0)), (None, False, (-1, -1))],
)
def test_a_packed_batch_goes_there_and_comes_out_as_before(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, key_heads: int, window: int | None, causal: bool,
    sides: tuple[int, int],
) -> None:  # fmt: skip
    tensors, borders = inputs(key_heads), torch.tensor(CUTS, dtype=torch.int32)
    arguments: dict[str, Any] = {"cu_seq_lens_q": borders, "sliding_window": window, "is_causal": causal}
    got = attention(Layer(), *tensors, None, scaling=0.3, **arguments)[0]
    assert [call["window_size"] for call in calls] == [sides] and calls[0]["scale"] == 0.3
    monkeypatch.setattr(cuda_attention, "takes", lambda *_: False)
    want = attention(Layer(), *tensors, None, scaling=0.3, **arguments)[0]
    assert len(calls) == 1 and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(want)
    for mine, theirs in zip(*(torch.autograd.grad(out, tensors, upstream) for out in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": 0.1},
        {"softcap": 5.0},
        {"s_aux": torch.zeros(4)},
        {"cu_seq_lens_q": None},
        {"prefix_key": torch.zeros(4, 2, 8), "prefix_value": torch.zeros(4, 2, 8)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_it_does_not_do_goes_the_other_way(calls: list[dict[str, Any]], other: dict[str, Any]) -> None:
    arguments = {"cu_seq_lens_q": torch.tensor(CUTS, dtype=torch.int32), **other}
    attention(Layer(), *inputs(4), None, **arguments)
    assert not calls


def tensor_of(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, size: int = 64) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 10, size))


def test_it_takes_what_the_kernel_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "_has_flash", lambda _: True)
    takes = cuda_attention.takes
    for good in (tensor_of(), tensor_of(dtype=torch.float16), tensor_of(size=192), tensor_of(size=256)):
        assert takes(good, good, good)
    bad = (tensor_of("cpu"), tensor_of(dtype=torch.float32), *(tensor_of(size=size) for size in (20, 200, 264)))
    assert not any(takes(t, t, t) for t in bad)
    assert not takes(tensor_of(), tensor_of(), tensor_of(size=32))
    monkeypatch.setattr(cuda_attention, "_has_flash", lambda _: False)
    assert not takes(tensor_of(), tensor_of(), tensor_of())


def test_this_torch_has_it_with_all_arguments() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    assert cuda_attention._varlen_attn() is not None


def test_borders_that_are_not_the_batch_s_are_refused(calls: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens cover 30 tokens, but the packed batch has 31"):
        attention(Layer(), *inputs(4), None, cu_seq_lens_q=torch.tensor([0, 30]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_it_is_the_formula(dtype: torch.dtype, size: int, window: int | None) -> None:
    tensors, borders = inputs(2, dtype, "cuda", size), torch.tensor(CUTS, dtype=torch.int32)
    assert cuda_attention.takes(*tensors)
    out = attention(Layer(), *tensors, None, cu_seq_lens_q=borders, sliding_window=window)[0]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    rows, longest = [t[0].transpose(0, 1) for t in exact], 14
    sides = (-1 if window is None else window - 1, 0)
    want = varlen_in_torch(
        *rows, borders.cuda(), borders.cuda(), longest, longest, scale=size**-0.5, window_size=sides, enable_gqa=True
    )[None]
    upstream = torch.randn_like(out)
    pairs = zip(
        [out, *torch.autograd.grad(out, tensors, upstream)],
        [want, *torch.autograd.grad(want, exact, upstream.double())],
        strict=True,
    )
    for mine, theirs in pairs:
        error = float((mine.double() - theirs).detach().abs().max()) / max(1.0, float(theirs.detach().abs().max()))
        assert error < {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
