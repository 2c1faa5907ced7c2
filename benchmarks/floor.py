"""The floor of a piece of work on this machine, and what every file of results says of a measurement.

A step cannot take less time than its floating-point operations over the best rate at which this machine multiplies
matrices, nor a decoded token less than the bytes that it must read over the rate at which memory is read. Both rates
are measured in the same run as the work, so a figure such as "70 % of the floor" means something on any machine.

What the floor leaves out: everything that a perfect program would hide behind the products, such as norms,
activations, the softmax of the loss and the optimizer. So 100 % is never reached, and a processor that shares its clock
between many or wide cores may be slower in a long step than in a short measurement.

Results are rows of results/*.csv, each with the columns of `stamp`. A script that bench.py starts prints one line for
each comparison with `announce`, which bench.py collects.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
_MARK = "result: "


class Bandwidth(NamedTuple):
    """Bytes a second: read from memory, and copied within it (both directions counted)."""

    read: float
    copy: float


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one LoRA step; a multiplication and an addition are two.

    Attributes:
        products: of the frozen layers, forward and for the gradients of their inputs. Weights get none.
        attention: forward, and a backward that computes the scores again: 2.5 times as much.
        adapters: A x and B A x, and the gradients of A, of B and of their inputs.
        head: logits of the trained positions, and the gradients of what they are made from.
        again: what activation checkpointing computes twice: products, attention and adapters forward.
    """

    products: int
    attention: int
    adapters: int
    head: int
    again: int

    @property
    def total(self) -> int:
        return self.products + self.attention + self.adapters + self.head + self.again


@dataclass(frozen=True)
class Comparison:
    """Ours beside a peer's, both in `unit`: seconds of something, or something a second.

    Attributes:
        work: what was done, with shape, dtype and size.
        peak, peer_peak: bytes, the highest resident set of the processes.
        floor: what this machine could do at best, in `unit`.
    """

    work: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str = ""
    peak: float | None = None
    peer_peak: float | None = None
    floor: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer."""
        return None if self.peer is None else self._gain(self.peer)

    @property
    def fraction(self) -> float | None:
        """How much of what this machine could do was done; at most 1."""
        return None if self.floor is None else self._gain(self.floor)

    def _gain(self, other: float) -> float:
        return self.ours / other if self.unit.endswith("a second") else other / self.ours


def measure_ceiling(dtype: str) -> float:
    """Floating-point operations a second of the fastest matrix product among a few as a training step has them.

    In float32 where the processor has no arithmetic for `dtype`: so are the products taken then.
    """
    import torch

    from lorica.kernels.linear import is_widened

    kind = getattr(torch, dtype)
    kind = torch.float32 if is_widened(torch.empty(0, dtype=kind)) else kind
    best, rows = 0.0, 2048
    for inner, outer in ((576, 1536), (1536, 576), (2048, 2048)):
        x, weight, out = (torch.randn(size).to(kind) for size in ((rows, inner), (outer, inner), (rows, outer)))
        seconds = _least_seconds(partial(torch.mm, x, weight.t(), out=out))
        best = max(best, 2 * rows * inner * outer / seconds)
    return best


def measure_bandwidth() -> Bandwidth:
    """Of tensors far larger than the caches; the best of several tries."""
    import torch

    matrix, vector = torch.ones(2**13, 2**13), torch.ones(2**13)
    target = torch.empty_like(matrix)
    read = min(_least_seconds(matrix.sum), _least_seconds(lambda: torch.mv(matrix, vector)))
    return Bandwidth(matrix.nbytes / read, 2 * matrix.nbytes / _least_seconds(lambda: target.copy_(matrix)))


def _least_seconds(call: Callable[[], object], seconds: float = 0.3) -> float:
    call()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def step_flops(
    config: Any, lengths: Sequence[int], *, rank: int = 16, trained: int | None = None, checkpointing: bool = False
) -> StepFlops:
    """What one step of LoRA on all linear layers of a model of this config must compute, found without its weights.

    The body runs once, forward and backward, on tensors without data. torch counts its products; a stand-in for its
    attention notes shape, causality and window of each call.

    Args:
        config: of transformers.
        lengths: of the samples, which see nothing of each other.
        trained: positions that go through the output head; None: all but the last of each sample; 0: no such head.
    """
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AttentionInterface, AutoModel
    from transformers.pytorch_utils import Conv1D

    tokens, text = sum(lengths), config.get_text_config()
    attention, adapters, adapters_forward = [0, 0], 0, 0

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> tuple[Any, None]:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        window = kwargs.get("sliding_window") or max(lengths)
        pairs = query.shape[1] * sum(num_pairs(length, window) if causal else length**2 for length in lengths)
        attention[0] += 2 * pairs * (query.shape[3] + value.shape[3])
        attention[1] += 2 * pairs * (3 * query.shape[3] + 2 * value.shape[3])
        out = query.new_zeros(*query.shape[:3], value.shape[3]) + query.sum() + key.sum() + value.sum()
        return out.transpose(1, 2), None

    def adapted(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> Any:
        """As an adapter would: what leaves the layer wants a gradient, also where what enters it wants none."""
        nonlocal adapters, adapters_forward
        (x,) = inputs
        once = 2 * rank * (out.numel() // out.shape[-1])
        adapters_forward += once * (x.shape[-1] + out.shape[-1])
        adapters += once * ((3 if x.requires_grad else 2) * x.shape[-1] + 3 * out.shape[-1])
        return out + torch.zeros(1, requires_grad=True)

    AttentionInterface.register("counted", attend)
    with torch.device("meta"), torch.enable_grad():
        model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="counted").eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_hook(adapted)
        with FlopCounterMode(display=False) as counter:
            hidden = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
            forward = counter.get_total_flops()
            hidden.sum().backward()
        products = counter.get_total_flops()
    positions = tokens - len(lengths) if trained is None else trained
    return StepFlops(
        products=products,
        attention=sum(attention),
        adapters=adapters,
        head=4 * positions * text.hidden_size * text.vocab_size,
        again=forward + attention[0] + adapters_forward if checkpointing else 0,
    )


def num_pairs(length: int, window: int) -> int:
    """Of a query and a key that it sees, itself and those before it within the window."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * window


def decode_bytes(model: Any, places: int, cached: Any = None) -> int:
    """What the decoding of a token reads: every weight once, of the embedding only rows, and `places` of the cache.

    Args:
        model: a causal language model, quantised or not.
        places: filled positions of all answers together.
        cached: dtype of their keys and values; None: the model's.
    """
    held = {id(t): t for t in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if all(t is not embedding.weight for t in head.parameters()):
        held.pop(id(embedding.weight), None)
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = places * 2 * heads * size * text.num_hidden_layers * (cached or model.dtype).itemsize
    return int(cached + sum(t.nbytes for t in held.values()))


def auto_dtype() -> str:
    """What `model.dtype: auto` takes on this machine for a checkpoint in bfloat16."""
    import torch
    from transformers import PretrainedConfig

    from lorica.models.load import pick_dtype

    return str(pick_dtype("auto", PretrainedConfig(dtype="bfloat16"), torch.device("cpu"))).removeprefix("torch.")


def resident_bytes(key: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most it ever held. (ru_maxrss is inherited from the parent.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def processor() -> str:
    """Its name, and which of its instructions matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    has = next((line for line in lines if line.startswith("flags")), "").split()
    return name + "".join(f" {flag}" for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in has)


def commit() -> str:
    """Of this checkout, with a `+` where files have changed since; empty outside of one."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def stamp() -> dict[str, object]:
    """When, at which commit and where: the first columns of every row."""
    load = round(os.getloadavg()[0], 2)
    day = time.strftime("%Y-%m-%d")
    return {"date": day, "commit": commit(), "machine": processor(), "cores": os.cpu_count(), "load": load}


def append_rows(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows, stamped, to results/`name`. A new column comes last, and is empty in the rows before."""
    file = RESULTS / name
    file.parent.mkdir(exist_ok=True)
    old: list[dict[str, object]] = []
    if file.exists():
        with file.open(newline="") as handle:
            old = list(csv.DictReader(handle))
    common = stamp()
    new = [{**common, **row} for row in rows]
    columns = list(dict.fromkeys(key for row in (*old[:1], *new) for key in row))
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])


def announce(found: Comparison) -> None:
    """Tell bench.py, in one line on stdout."""
    print(_MARK + json.dumps(asdict(found)), flush=True)


def is_announcement(line: str) -> bool:
    """Whether `announce` printed it."""
    return line.startswith(_MARK)


def announced(lines: Sequence[str]) -> list[Comparison]:
    """What a script told among the lines of its output."""
    return [Comparison(**json.loads(line.removeprefix(_MARK))) for line in lines if is_announcement(line)]


def rounded(number: float, digits: int = 4) -> float:
    """To so many significant digits, for a file."""
    return round(number, digits - 1 - math.floor(math.log10(abs(number)))) if number else number
