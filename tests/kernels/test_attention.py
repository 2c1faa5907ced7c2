"""Attention behind a prefix against the formula in float64, for every path of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.kernels import cpu_attention, torch_attention
from lorica.kernels.attention import attention as attend

HEADS, KEY_HEADS, SIZE, NUM_PREFIX = 4, 2, 8, 3


@dataclass(frozen=True)
class Case:
    """One call. lengths: of the samples, which stand in one row if they are packed. left: padding in front of each."""

    lengths: tuple[int, ...] = (7,)
    packed: bool = False
    left: tuple[int, ...] = ()
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False


CASES = {
    "causal": Case(),
    "in both directions": Case(causal=False),
    "one query": Case(lengths=(1,)),
    "a window": Case(window=3),
    "soft-capping and a window": Case(window=3, softcap=2.0),
    "sinks": Case(sinks=True),
    "position bias": Case(bias=True, causal=False),
    "packed": Case(lengths=(5, 5, 1, 9, 3), packed=True),
    "packed, one length": Case(lengths=(4, 4), packed=True),
    "packed, in both directions": Case(lengths=(5, 5, 2), packed=True, causal=False),
    "packed with a window": Case(lengths=(6, 2, 20), packed=True, window=4),
    "packed with sinks": Case(lengths=(6, 2), packed=True, sinks=True),
    "padded on the left": Case(lengths=(7, 7), left=(0, 4)),
    "padded, soft-capped, with sinks": Case(lengths=(7, 7), left=(2, 0), softcap=2.0, sinks=True),
}


def reference(
    case: Case, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], extra: dict[str, Any]
) -> Tensor:
    """[samples' tokens, H, D] of one row or sample [H, T, D] by loops over heads and queries, in the inputs' dtype."""
    num_tokens, rows = q.shape[1], []
    for t in range(num_tokens):
        first = 0 if case.window is None else max(0, t - case.window + 1)
        last = t if case.causal else num_tokens - 1
        seen = [i for i in range(first, last + 1) if i >= extra["first"]]
        heads = []
        for h in range(HEADS):
            g = h * KEY_HEADS // HEADS
            keys = torch.cat([prefix[0][g], k[g, seen]])
            values = torch.cat([prefix[1][g], v[g, seen]])
            scores = keys @ q[h, t] / SIZE**0.5
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if case.bias:
                scores = scores + torch.cat([torch.zeros(NUM_PREFIX).to(q), extra["bias"][0, h, t, seen]])
            if case.sinks:
                scores = torch.cat([scores, extra["sinks"][h : h + 1]])
            heads.append(scores.softmax(0)[: len(values)] @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_query_sees_the_whole_prefix_beside_what_it_sees_else(
    name: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    if not is_compiled:
        monkeypatch.setattr(cpu_attention, "takes", lambda *_, **__: False)
    torch.manual_seed(0)
    num_rows = 1 if case.packed else len(case.lengths)
    num_tokens = sum(case.lengths) if case.packed else case.lengths[0]
    q = torch.randn(num_rows, HEADS, num_tokens, SIZE)
    k, v = (torch.randn(num_rows, KEY_HEADS, num_tokens, SIZE) for _ in range(2))
    prefix = [torch.randn(KEY_HEADS, NUM_PREFIX, SIZE) for _ in range(2)]
    sinks, bias = torch.randn(HEADS), torch.randn(1, HEADS, num_tokens, num_tokens)
    mine = [t.clone().requires_grad_() for t in (q, k, v, *prefix)]
    keywords: dict[str, Any] = {"sliding_window": case.window, "softcap": case.softcap, "is_causal": case.causal}
    keywords |= {"s_aux": sinks if case.sinks else None, "position_bias": bias if case.bias else None}
    mask = None
    if case.packed:
        keywords["cu_seq_lens_q"] = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32)
    if case.left:
        real = torch.arange(num_tokens) >= torch.tensor(case.left)[:, None]
        mask = (real[:, None] & torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril())[:, None]
    out, weights = attend(
        nn.Identity(), *mine[:3], mask, **keywords, prefix_key=mine[3], prefix_value=mine[4], dropout=0.0
    )
    assert weights is None and out.is_contiguous()

    theirs = [t.double().clone().requires_grad_() for t in (q, k, v, *prefix)]
    wide = {"sinks": sinks.double(), "bias": bias.double()}
    cuts = list(torch.tensor(case.lengths).cumsum(0)) if case.packed else []
    parts = []
    for row in range(num_rows):
        first = case.left[row] if case.left else 0
        bounds = list(zip([0, *cuts[:-1]], cuts, strict=True)) if case.packed else [(0, num_tokens)]
        samples = [[t[row, :, a:b] for t in theirs[:3]] for a, b in bounds]
        parts += [reference(case, *sample, (theirs[3], theirs[4]), {**wide, "first": first}) for sample in samples]
    want = torch.cat(parts)
    got = out.flatten(0, 1)
    # What a query of padding says is read by nobody.
    kept = torch.cat([torch.arange(num_tokens) >= n for n in case.left]) if case.left else torch.ones(len(got)) > 0
    torch.testing.assert_close(got[kept].double(), want[kept], atol=1e-5, rtol=1e-5)

    upstream = torch.randn(got.shape)
    (got * upstream)[kept].sum().backward()
    (want * upstream)[kept].sum().backward()
    for ours, wanted in zip(mine, theirs, strict=True):
        assert ours.grad is not None and wanted.grad is not None
        torch.testing.assert_close(ours.grad.double(), wanted.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(9,), (5, 4)])
def test_sixteen_bits_that_the_cpu_lacks_are_widened_behind_a_prefix_too(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed in float32 is kept in 16 bits for backward; the prefix stays a float32 master."""
    monkeypatch.setattr(cpu_attention, "takes", lambda *_, **__: False)
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, 9, SIZE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, KEY_HEADS, 9, SIZE, dtype=torch.bfloat16) for _ in range(2))
    prefix = [torch.randn(KEY_HEADS, NUM_PREFIX, SIZE, requires_grad=True) for _ in range(2)]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)

    def run(*, widened: bool, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(torch_attention, "is_widened", lambda t: widened and t.dtype is torch.bfloat16)
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        given = [t.detach().clone().requires_grad_() for t in prefix]
        out, _ = attend(nn.Identity(), *inputs, None, cu_seq_lens_q=borders, prefix_key=given[0], prefix_value=given[1])
        assert out.dtype is dtype
        grads = torch.autograd.grad(out.float().square().sum(), [*inputs, *given])
        assert grads[3].dtype is torch.float32
        return [out.float(), *(grad.float() for grad in grads)]

    for mine, exact in zip(
        run(widened=True, dtype=torch.bfloat16), run(widened=False, dtype=torch.float32), strict=True
    ):
        torch.testing.assert_close(mine, exact, atol=0.15, rtol=0.05)


@pytest.mark.skipif(cpu_attention.compiled() is None, reason="no C compiler")
@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}, {}], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_a_cpu_has_it_all_from_the_kernel(packed: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "attend", None)
    q, k, v = (torch.randn(1, heads, 6, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    borders = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None
    assert attend(nn.Identity(), q, k, v, None, cu_seq_lens_q=borders, **more)[0].shape == (1, 6, HEADS, SIZE)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_dropout_reaches_the_prefix_too(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but a prefix to see beside itself, half of its weights are dropped."""
    if not is_compiled:
        monkeypatch.setattr(cpu_attention, "takes", lambda *_, **__: False)
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 1, 4)
    v, value = torch.zeros(1, 1, 1, 4), torch.ones(1, 4096, 4)
    out, _ = attend(nn.Identity(), q, k, v, None, dropout=0.5, prefix_key=torch.zeros(1, 4096, 4), prefix_value=value)
    assert 0.9 < float(out[0, 0, 0, 0]) < 1.1
    again, _ = attend(nn.Identity(), q, k, v, None, dropout=0.5, prefix_key=torch.zeros(1, 4096, 4), prefix_value=value)
    assert not torch.equal(out, again)
