"""Attention in C and its gradient against the formula in float64, in every way in which the C can be compiled."""

from __future__ import annotations

import inspect
import math
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorica.kernels import attention_library, build, cpu_attention
from lorica.kernels.cpu_attention import attend

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.skipif(os.environ.get("LORICA_KERNELS") == "reference", reason="LORICA_KERNELS forbids compiled parts"),
]
MARCH = {512: "x86-64-v4", 256: "x86-64-v3", 0: "x86-64"}
NEEDS = {512: "avx512bw", 256: "avx2", 0: "sse2"}
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Of the largest value; torch's own kernel comes as near in 16 bits."""


@dataclass(frozen=True)
class Case:
    """One call. cuts: borders of packed samples. keys: where there are more of them than queries."""

    heads: tuple[int, int] = (4, 2)
    tokens: int = 37
    keys: int | None = None
    size: int = 16
    rows: int = 1
    cuts: tuple[int, ...] = ()
    causal: bool = True
    window: int | None = None
    prefix: int = 0
    value_size: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0


CASES = {
    "rows": Case(rows=2),
    "one token": Case(tokens=1),
    "packed, of very different lengths": Case(tokens=201, cuts=(0, 1, 3, 50, 201), size=64),
    "blocks of keys and of queries": Case(heads=(2, 1), tokens=300, size=33),
    "a window within a block": Case(tokens=130, window=5, size=80),
    "a window over blocks, packed": Case(tokens=330, cuts=(0, 30, 330), window=120),
    "a prefix": Case(tokens=101, cuts=(0, 40, 101), prefix=7),
    "a prefix longer than a block, and a window": Case(tokens=130, prefix=150, window=9),
    "in both directions": Case(rows=2, tokens=65, causal=False),
    "in both directions, packed": Case(tokens=150, cuts=(0, 20, 150), causal=False),
    "more keys than queries": Case(rows=2, tokens=65, keys=140),
    "the next token": Case(heads=(6, 3), tokens=1, keys=300, size=64),
    "across, with a prefix": Case(tokens=9, keys=130, causal=False, prefix=3),
    "large heads": Case(heads=(2, 2), tokens=50, size=256),
    "values narrower than keys": Case(tokens=130, size=48, value_size=32, prefix=4),
    "values wider than keys": Case(tokens=130, cuts=(0, 60, 130), size=24, value_size=50),
    "soft-capping": Case(tokens=131, size=256, softcap=1.5),
    "soft-capping and a window": Case(tokens=150, cuts=(0, 31, 150), window=20, softcap=50.0),
    "sinks": Case(heads=(6, 2), rows=2, tokens=65, window=9, sinks=True),
    "dropout": Case(rows=2, tokens=113, causal=False, size=64, dropout=0.1),
    "dropout, packed": Case(tokens=201, cuts=(0, 1, 50, 201), causal=False, dropout=0.5),
    "dropout in a window behind a prefix": Case(tokens=151, prefix=101, window=9, dropout=0.3),
    "dropout, more keys than queries": Case(rows=2, tokens=65, keys=140, size=32, dropout=0.1),
    "all of it": Case(
        tokens=230, cuts=(0, 90, 230), window=70, prefix=5, size=40, softcap=2.0, sinks=True, dropout=0.2
    ),
}


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Query, key, value and prefixes that want gradients, the other arguments, and the output's gradient."""
    torch.manual_seed(0)
    heads, key_heads = case.heads
    keys = case.tokens if case.keys is None else case.keys
    sizes = (case.size, case.value_size or case.size)
    # Heads within tokens, as projections give them; keys the other way round.
    q = torch.randn(case.rows, case.tokens, heads, case.size, dtype=dtype).transpose(1, 2)
    tensors = [q, *(torch.randn(case.rows, key_heads, keys, size, dtype=dtype) for size in sizes)]
    if case.prefix:
        # Masters are float32; here such that 16 bits hold them.
        tensors += [torch.randn(key_heads, case.prefix, size).to(dtype).float() for size in sizes]
    if case.sinks:
        tensors.append(torch.randn(heads))
    arguments: dict[str, Any] = {"scale": case.size**-0.5, "causal": case.causal, "window": case.window}
    arguments |= {"softcap": case.softcap, "dropout": case.dropout}
    if case.cuts:
        arguments["cu_seqlens"] = torch.tensor(case.cuts, dtype=torch.int32)
    upstream = torch.randn(*q.shape[:3], sizes[1], dtype=dtype)
    return [t.requires_grad_() for t in tensors], arguments, upstream


def named(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Those behind query, key and value by the arguments that they are: prefixes are a pair."""
    names = ("prefix_key", "prefix_value", "sinks") if len(tensors) > 4 else ("sinks",)
    return dict(zip(names, tensors[3:], strict=False))


def kept(case: Case, seed: int, queries: range, keys: range) -> Tensor:
    """[H, queries, keys]: which weights dropout keeps, after csrc/scores.h, in numpy's arithmetic.

    Queries are numbered through all samples, keys within theirs, and those of a prefix are negative.
    """
    wide, narrow = np.uint64, np.uint32
    with np.errstate(over="ignore"):
        place = np.arange(case.heads[0], dtype=wide)[:, None, None] << wide(32)
        place = wide(seed) + (place | np.array(queries, wide)[:, None]) * wide(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            place = (place ^ place >> wide(shift)) * wide(factor)
        place ^= place >> wide(31)
        key: npt.NDArray[np.uint32] = np.array(keys, np.int64).astype(narrow)
        x = (place >> wide(32)).astype(narrow) + key * (place.astype(narrow) | narrow(1))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> narrow(shift)) * narrow(factor)
    return torch.from_numpy(x.view(np.int32) > math.trunc(case.dropout * 2**32 - 2**31 - 1))


def formula(case: Case, tensors: list[Tensor], seed: int = 0) -> Tensor:
    q, k, v = tensors[:3]
    more = named(tensors)
    prefix = [more[name] for name in ("prefix_key", "prefix_value") if name in more]
    group = case.heads[0] // case.heads[1]
    rows = []
    for row in range(case.rows):
        cuts = case.cuts or (0, case.tokens)
        parts = []
        for begin, end in pairwise(cuts):
            mine = slice(begin, end) if case.cuts else slice(None)
            keys, values = k[row, :, mine], v[row, :, mine]
            behind = torch.arange(keys.shape[1])[None] - torch.arange(end - begin)[:, None]
            behind = (keys.shape[1] - (end - begin)) - behind
            sees = (behind >= 0) & (behind < (case.window or 10**6)) if case.causal else torch.ones_like(behind) > 0
            if prefix:
                keys, values = (torch.cat([p, t], 1) for p, t in zip(prefix, (keys, values), strict=True))
                sees = torch.cat([torch.ones(end - begin, case.prefix, dtype=torch.bool), sees], 1)
            scores = q[row, :, begin:end] @ keys.repeat_interleave(group, 0).transpose(1, 2) * case.size**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~sees, -torch.inf)
            if case.sinks:
                scores = torch.cat([scores, more["sinks"][:, None, None].expand(-1, end - begin, 1)], 2)
            weights = scores.softmax(-1)[..., : keys.shape[1]]
            if case.dropout:
                first = row * case.tokens + begin
                columns = range(-case.prefix, keys.shape[1] - case.prefix)
                weights = weights * kept(case, seed, range(first, first + end - begin), columns) / (1 - case.dropout)
            parts.append(weights @ values.repeat_interleave(group, 0))
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows)


def ours(tensors: list[Tensor], arguments: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(1)
    out = attend(*tensors[:3], **arguments, **named(tensors))
    assert out.dtype is upstream.dtype and out.transpose(1, 2).is_contiguous()
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def exactly(case: Case, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The same in float64, by the formula."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    torch.manual_seed(1)
    out = formula(case, exact, int(torch.randint(2**63 - 1, ())))
    return [out.detach(), *torch.autograd.grad(out, exact, upstream.double())]


def check(case: Case, dtype: torch.dtype) -> None:
    tensors, arguments, upstream = inputs(case, dtype)
    for mine, theirs in zip(ours(tensors, arguments, upstream), exactly(case, tensors, upstream), strict=True):
        error = float((mine.double() - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize("name", ["packed, of very different lengths", "a prefix", "large heads", "all of it"])
def test_several_threads_share_a_sample(name: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        check(CASES[name], torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(MARCH))
def simd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Compiled with vectors of so many bits, warnings being errors; skipped where the processor lacks them."""
    if platform.machine() != "x86_64":
        pytest.skip("the paths are those of x86-64")
    flags = (f"-march={MARCH[request.param]}", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "cache_folder", lambda: tmp_path_factory.mktemp("cache"))
        patch.setattr(attention_library, "FLAGS", (*flags, *attention_library.FLAGS[1:]))
        attention_library.compiled.cache_clear()
        built = attention_library.compiled()
        assert built is not None
        if NEEDS[request.param] not in Path("/proc/cpuinfo").read_text().split():
            attention_library.compiled.cache_clear()
            pytest.skip(f"this processor has no {NEEDS[request.param]}")
        yield request.param
    attention_library.compiled.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_every_path_is_right(simd: int, name: str) -> None:
    check(CASES[name], torch.float32)


@pytest.fixture(scope="module", params=["AMX", "AVX512"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel for bfloat16, its instructions computed in C after Intel's definitions."""
    flags = ("-DEMULATED", f"-D{request.param}", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "cache_folder", lambda: tmp_path_factory.mktemp("cache"))
        built = attention_library._loaded("attention_bfloat16.c", (*attention_library.FLAGS, *flags))
    assert built is not None
    return built


@pytest.fixture
def tiles(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cpu_attention, "tiled", lambda: emulated)
    return emulated


@pytest.mark.parametrize("name", CASES)
def test_tiles_of_bfloat16_are_right(tiles: Any, name: str) -> None:
    check(CASES[name], torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 5])
def test_tiles_err_no_more_than_torch_does_in_bfloat16(tiles: Any, threads: int) -> None:
    case = Case(heads=(9, 3), tokens=150, size=64)
    tensors, arguments, upstream = inputs(case, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mine, again = (ours(tensors, arguments, upstream) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, mine, again))
    q, k, v = tensors
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    theirs = [out.detach(), *torch.autograd.grad(out, tensors, upstream)]
    for my, their, exact in zip(mine, theirs, exactly(case, tensors, upstream), strict=True):
        assert float((my - exact).square().mean()) < 1.02 * float((their - exact).square().mean())


def test_tiles_take_numbers_below_the_smallest_normal_one_for_zero(tiles: Any) -> None:
    """As the instructions do: so the emulation is one."""
    q = torch.zeros(1, 1, 3, 8, dtype=torch.bfloat16)
    assert not bool(attend(q, q, q + 1e-39, scale=1.0, causal=True).any())


def test_tiles_lose_nothing_that_is_not_finite(tiles: Any) -> None:
    for place in range(3):
        tensors, arguments, upstream = inputs(Case(tokens=250, heads=(1, 1)), torch.bfloat16)
        with torch.no_grad():
            tensors[place][0, 0, 3] = torch.nan
        is_finite = ours(tensors, arguments, upstream)[0][0, 0].isfinite().all(-1)
        assert not bool(is_finite[3]) and bool(is_finite[4:].any()) is (place == 0)


def test_tiles_are_trusted_after_a_trial_and_torch_s_modes_do_not_matter(tiles: Any) -> None:
    with FakeTensorMode():
        assert attention_library._is_right(tiles)


@pytest.mark.parametrize(("lent", "warned"), [(1, 1), (0, 0)])
def test_tiles_that_are_wrong_or_not_lent_are_not_used(monkeypatch: pytest.MonkeyPatch, lent: int, warned: int) -> None:
    """Wrong: all results stay zero."""
    idle = SimpleNamespace(lorica_attention=lambda *_: 1, lorica_attention_backward=lambda *_: 1)
    idle.lorica_tiles_are_lent = lambda: lent
    load = attention_library._loaded
    monkeypatch.setattr(attention_library, "_loaded", lambda *a: idle if a[0] == "attention_bfloat16.c" else load(*a))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with warnings.catch_warnings(record=True) as caught:
        assert inspect.unwrap(attention_library.tiled)() is None
    assert len(caught) == warned and all("amx_bf16 gives wrong numbers" in str(w.message) for w in caught)


@pytest.mark.parametrize("name", attention_library._TILE_FLAGS)
def test_the_instructions_themselves_compile(name: str, tmp_path: Path) -> None:
    """For a processor that has them, whatever this one is."""
    if platform.machine() != "x86_64":
        pytest.skip("the instructions are those of x86-64")
    made, flags = tmp_path / "made.s", ("-march=x86-64-v4", "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-function")
    command = ["cc", "-S", "-O1", *flags, *attention_library._TILE_FLAGS[name], "-o", str(made)]
    if subprocess.run([*command, "-x", "c", "-"], input=b"", capture_output=True, check=False).returncode:
        pytest.skip("the compiler does not know them")
    source = str(build._SOURCES / "attention_bfloat16.c")
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert not done.stderr
    assert {"amx_bf16": "tdpbf16ps", "avx512_bf16": "vdpbf16ps"}[name] in made.read_text()


def weights_of(dropout: float, seed: int, heads: int = 8, tokens: int = 300) -> Tensor:
    """[H, T, T]: what dropout multiplies weights by: where all are alike and values are the identity, it comes out."""
    torch.manual_seed(seed)
    q, v = torch.zeros(1, heads, tokens, 32), torch.eye(tokens).expand(1, heads, -1, -1)
    return attend(q, q, v, scale=1.0, causal=False, dropout=dropout)[0] * tokens


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_weights_are_dropped_at_their_rate_and_independently(dropout: float) -> None:
    """Of each pair of neighbours: keys at many distances, queries, heads, and seeds. Five standard errors."""
    weights, other = weights_of(dropout, 0), weights_of(dropout, 1)
    torch.testing.assert_close(weights[weights > 0], torch.tensor(1 / (1 - dropout)).expand(int((weights > 0).sum())))
    drops, others = ((t == 0).double() - dropout for t in (weights, other))
    variance = dropout * (1 - dropout)
    assert abs(float(drops.sum())) < 5 * (variance * drops.numel()) ** 0.5
    pairs = [(drops, others), (drops[1:], drops[:-1]), (drops[:, 1:], drops[:, :-1]), (drops[0], drops[-1])]
    pairs += [(drops[..., step:], drops[..., :-step]) for step in (1, 2, 3, 4, 7, 8, 16, 32, 96, 128, 256)]
    for a, b in pairs:
        assert abs(float((a * b).sum())) < 5 * variance * a.numel() ** 0.5
    # How many a query loses varies as it should, too.
    assert 0.9 < float(drops.sum(-1).var()) / (variance * drops.shape[-1]) < 1.1


def test_dropout_is_repeated_by_the_generator_s_state_alone() -> None:
    assert torch.equal(weights_of(0.3, 5, tokens=40), weights_of(0.3, 5, tokens=40))
    state = torch.get_rng_state()
    assert not torch.equal(state, torch.manual_seed(5).get_state())
    weights_of(0.0, 5, tokens=40)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())


def test_a_checkpoint_draws_the_same_again() -> None:
    tensors, arguments, upstream = inputs(CASES["all of it"])

    def run(*tensors: Tensor) -> Tensor:
        return attend(*tensors[:3], **arguments, **named(list(tensors)))

    found = []
    for call in (run, lambda *t: checkpoint(run, *t, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(call(*tensors), tensors, upstream))
    assert all(map(torch.equal, *found))


def test_dropping_everything_leaves_nothing() -> None:
    tensors, arguments, upstream = inputs(Case(dropout=1.0, prefix=2, sinks=True))
    assert not any(bool(t.any()) for t in ours(tensors, arguments, upstream))


def test_a_later_token_and_another_sample_change_nothing() -> None:
    case = Case(tokens=120, cuts=(0, 70, 120))
    (q, k, v), arguments, _ = inputs(case)
    before = attend(q, k, v, **arguments)
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[:, :, 33:70] += 1.0
    after = attend(q, k, v, **arguments)
    assert torch.equal(before[:, :, :33], after[:, :, :33]) and torch.equal(before[:, :, 70:], after[:, :, 70:])
    assert not torch.allclose(before[:, :, 33:70], after[:, :, 33:70])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_lost(place: int, value: float) -> None:
    """A run that diverges has to be seen."""
    tensors, arguments, _ = inputs(Case(tokens=250, heads=(1, 1)))
    with torch.no_grad():
        tensors[place][0, 0, 3] = value
    out = attend(*tensors, **arguments)
    is_finite = out[0, 0].isfinite().all(-1)
    # Every later query meets that key, or that value; none meets that query.
    assert not bool(is_finite[3]) and bool(is_finite[4:].any()) is (place == 0)


def test_large_scores_do_not_overflow() -> None:
    (q, k, v), arguments, _ = inputs(Case(tokens=60))
    out = attend(q * 300, k * 300, v, **arguments)
    want = formula(Case(tokens=60), [t.double() for t in (q * 300, k * 300, v)])
    torch.testing.assert_close(out.double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("has_all", [False, True])
def test_both_are_operators_as_torch_wants_them(has_all: bool) -> None:
    (q, k, v, *more), arguments, upstream = inputs(Case(tokens=20, cuts=(0, 8, 20), prefix=3 * has_all, sinks=has_all))
    borders = cpu_attention._borders(arguments["cu_seqlens"], 1, 20, 20)
    optional = (*more, torch.tensor(7), 0.25, 2.0, 0.1) if has_all else (None, None, None, None, 0.25, 0.0, 0.0)
    given = (q, k, v, borders, *optional, True, cpu_attention._NO_WINDOW)
    torch.library.opcheck(torch.ops.lorica.attention.default, given)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in given]
    output = torch.ops.lorica.attention(*plain)
    torch.library.opcheck(torch.ops.lorica.attention_backward.default, (upstream, *output, *plain))


def test_it_compiles_into_one_graph_with_its_gradient() -> None:
    (q, k, v, *prefix), arguments, upstream = inputs(Case(tokens=20, prefix=3, dropout=0.2))
    arguments |= {"prefix_key": prefix[0], "prefix_value": prefix[1]}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert cpu_attention.takes(q, k, causal=True, plain=False)
        return attend(q, k, v, **arguments)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, run):
        torch.manual_seed(2)
        found.append(torch.autograd.grad(call(q, k, v), (q, k, v), upstream))
    assert all(map(torch.equal, *found))


def test_borders_that_are_not_the_batch_s_are_refused() -> None:
    (q, k, v), arguments, _ = inputs(Case(tokens=20))
    with pytest.raises(ValueError, match=r"cu_seqlens cover 19 tokens, but the packed batch has 20"):
        attend(q, k, v, **{**arguments, "cu_seqlens": torch.tensor([0, 19])})


def test_what_it_does_not_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 4, 8)
    assert cpu_attention.takes(q, q, causal=True)
    assert not cpu_attention.takes(q.double(), q.double(), causal=True)
    assert not cpu_attention.takes(q, q[:, :, :2], causal=True)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_attention, "cpu_computes", lambda _: True)
        patch.setattr(cpu_attention, "tiled", lambda: None)
        assert not cpu_attention.takes(q.half(), q.half(), causal=True)
        assert cpu_attention.takes(q.half(), q.half(), causal=True, plain=False)
    monkeypatch.setattr(cpu_attention, "compiled", lambda: None)
    assert not cpu_attention.takes(q, q, causal=True)
