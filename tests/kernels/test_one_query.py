"""Attention of one query in C, in every way in which it can be compiled, against the formula in float64; its masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from lorica.kernels import attention, build, one_query
from tests.kernels.test_nf4_paths import DTYPES, MARCH, flags, pytestmark, runnable  # noqa: F401


def query_flags(simd: int) -> tuple[str, ...]:
    return (*flags(simd)[:1], "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", *one_query.FLAGS[1:])


@pytest.mark.parametrize("simd", MARCH)
def test_every_path_compiles_without_a_warning(simd: int) -> None:
    assert build.library("one_query.c", query_flags(simd)) is not None


@pytest.fixture(params=runnable())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    built = one_query.compiled(query_flags(request.param))
    monkeypatch.setattr(one_query, "compiled", lambda: built)
    yield request.param


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: dict[str, Any]) -> Tensor:
    """[B, 1, H, V] in float64, with keys and values repeated."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * how["scale"]
    if how.get("softcap"):
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if how.get("sinks") is not None:
        sinks = how["sinks"].double().view(1, -1, 1, 1).expand(len(q), -1, 1, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 4, 1, 8, 8), (2, 6, 2, 37, 64, 64), (3, 4, 1, 130, 20, 12)])
def test_it_is_the_formula(path: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows, heads, key_heads, keys, size, value_size = shape
    torch.manual_seed(keys)
    q = torch.randn(rows, heads, 1, size).to(dtype)
    # As in a cache: the first of more tokens; and as a projection gives them.
    k = torch.randn(rows, key_heads, keys + 5, size).to(dtype)[:, :, :keys]
    v = torch.randn(rows, keys, key_heads, value_size).to(dtype).transpose(1, 2)
    padding = torch.arange(keys + 2) >= torch.arange(rows)[:, None] * (keys // 4)
    sinks = torch.randn(heads)
    for mask in (None, padding[:, None, None, 2:], padding[-1:, None, None, 2:]):
        for more in ({}, {"softcap": 1.5}, {"sinks": sinks}):
            how = {"scale": size**-0.5, **more}
            got = one_query.attend(q, k, v, mask, **how)
            expected = formula(q, k, v, mask, how)
            assert got.dtype is dtype and got.shape == expected.shape
            tolerance = 2e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_row_that_sees_nothing_is_zero_and_a_nan_stays_where_it_is(path: int) -> None:
    q, k = torch.ones(3, 2, 1, 8), torch.ones(3, 1, 5, 8)
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[0] = False
    k[1, 0, 2, 3] = float("nan")
    out = one_query.attend(q, k, torch.ones(3, 1, 5, 8), mask, scale=1.0)
    assert torch.equal(out[0], torch.zeros(1, 2, 8)) and out[1].isnan().all() and torch.allclose(out[2], torch.ones(1))


def test_threads_share_the_rows(path: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(16, 4, 1, 64), torch.randn(16, 2, 90, 64), torch.randn(16, 2, 90, 64)
    before, expected = torch.get_num_threads(), formula(q, k, v, None, {"scale": 0.1})
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(one_query.attend(q, k, v, scale=0.1).double(), expected, rtol=2e-6, atol=2e-6)
    finally:
        torch.set_num_threads(before)


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
@pytest.mark.parametrize("begin", [0, 3, 4])
def test_the_mask_of_one_query_says_what_transformers_says(padded: bool, kind: str, begin: int) -> None:
    """None where all is seen. The query stands at 8; the cache has kept what comes from `begin` on."""
    function = {
        "causal": causal_mask_function,
        "window": sliding_window_causal_mask_function(6),
        "chunk": chunked_causal_mask_function(4, torch.tensor([2, 0] if padded else [0, 0])),
    }[kind]
    given: dict[str, Any] = {
        "batch_size": 2, "q_length": 1, "kv_length": 9 - begin, "q_offset": 8, "kv_offset": begin,
        "mask_function": function, "attention_mask": PADDED if padded else None,
        "local_size": {"causal": None, "window": 6, "chunk": 4}[kind],
    }  # fmt: skip
    got = attention.mask(**given)
    expected = sdpa_mask(**given, allow_is_causal_skip=False)
    everything = torch.ones(2, 1, 1, 9 - begin, dtype=torch.bool)
    assert torch.equal((everything if got is None else got.expand_as(everything)), expected.expand_as(everything))
    if kind != "chunk" and not padded and (kind == "causal" or begin >= 3):
        assert got is None
