"""One LoRA training step beside PEFT's, eager and compiled, in the same run.

    python benchmarks/train_step.py                       # 135M Llama shape, 4 x 512 tokens, r = 16, all linear layers
    python benchmarks/train_step.py --shape 1b --checkpointing --steps 3 --rounds 1
    python benchmarks/train_step.py --sides lorica peft peft-compiled --cold
    python benchmarks/train_step.py --shape qwen3 --layers 2 --samples 2 --length 64 --steps 50     # equal losses

Each side runs in a process of its own, since peak memory is a property of a process; the sides take turns (A B A B),
and the ratio of their medians is what counts: absolute seconds on a shared machine drift. Both start from the same
random weights and the same A, with B zero, and see the same random tokens, other ones at each step. Their losses are
compared step by step; a difference beyond the tolerance is a failure. The peak includes the import of torch and
transformers on both sides; `growth` is what lies above the resident set with the model loaded.

`first` is the time from the model to the end of its first step, with all that is compiled on the way: in the first
process of a side, and in a later one, which finds inductor's cache warm. With `--cold` Lorica's own compiled parts are
built anew, too. The floor is floor.py's. PEFT is needed for this script only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from floor import (
    Comparison,
    announce,
    append_rows,
    auto_dtype,
    measure_ceiling,
    processor,
    resident_bytes,
    rounded,
    step_flops,
)

SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M and 360M.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True},
    # Llama-3.2-1B.
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 65536, "tie_word_embeddings": True},
    # Gemma 3, of which five layers of six see a window; Gemma 2, with soft-capping, where it is every other layer.
    "gemma": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 4,
              "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 65536, "sliding_window": 128},
    "gemma2": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 4,
               "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 65536, "sliding_window": 128},
    # Dropout would draw other numbers on each side.
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0},
}  # fmt: skip
KINDS = {"qwen3": "Qwen3Config", "gpt2": "GPT2Config", "gemma": "Gemma3TextConfig", "gemma2": "Gemma2Config"}
PACKAGES = {
    "lorica": ("lorica.methods.lora", "lorica.models.loss", "lorica.training.optim"),
    "peft": ("peft",),
    "peft-compiled": ("peft", "torch._inductor.compile_fx"),
}
SIDES = tuple(PACKAGES)
RANK, ALPHA, LR = 16, 32, 1e-3
Results = dict[str, list[dict[str, Any]]]
"""What the processes of each side found."""

# In nats, of a loss of about 11. Fifty steps in float32 came to 1e-5 where only the order of sums differs.
TOLERANCES = {"float32": 2e-4, "bfloat16": 5e-2}


def make_config(shape: str, layers: int | None = None) -> Any:
    import transformers

    changes = {"n_layer" if shape == "gpt2" else "num_hidden_layers": layers} if layers else {}
    kind = getattr(transformers, KINDS.get(shape, "LlamaConfig"))
    return kind(**{**SHAPES[shape], **changes}, bos_token_id=0, eos_token_id=2)


def build(shape: str, dtype: str, layers: int | None = None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(shape, layers), dtype=getattr(torch, dtype))


def prepare_peft(model: Any, *, checkpointing: bool = False, compiled: bool = False) -> Callable[[Any], float]:
    """What takes a step over ids [samples, length] and gives its loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    options = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, options).train()
    starts = {n: p for n, p in adapted.named_parameters() if ".lora_A." in n}
    start_alike({n.removeprefix("base_model.model.").partition(".lora_A.")[0]: p for n, p in starts.items()})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, fused=True)
    forward = torch.compile(adapted) if compiled else adapted

    def step(ids: Any) -> float:
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def prepare_lorica(model: Any, *, checkpointing: bool = False) -> Callable[[Any], float]:
    """As `prepare_peft`, the way `lorica train` does it."""
    import torch

    import lorica
    from lorica.models.load import equip
    from lorica.models.loss import make_loss
    from lorica.training.offload import checkpoint_layers
    from lorica.training.optim import make_optimizer

    lorica.adapt(equip(model), lorica.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear"))
    start_alike({name: adapter.lora_a for name, adapter in lorica.adapters(model).items()})
    model.train()
    checkpoint_layers(model, checkpointing)
    loss_of = make_loss(model)
    trained = lorica.trainable_parameters(model)
    optimizer = make_optimizer(trained, lr=LR, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)

    def step(ids: Any) -> float:
        samples, length = ids.shape
        borders = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
        inputs = {
            "input_ids": ids.reshape(1, -1), "position_ids": torch.arange(length).repeat(samples)[None],
            "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length,
        }  # fmt: skip
        targets = torch.cat([ids[:, 1:], torch.full((samples, 1), -100)], dim=1).reshape(1, -1)
        loss = loss_of(model, inputs, targets) / (samples * (length - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def start_alike(matrices: dict[str, Any]) -> None:
    """Fill each A by what its layer is called, the same on every side."""
    import torch

    generator = torch.Generator().manual_seed(2)
    for name in sorted(matrices):
        matrix = matrices[name]
        bound = matrix.shape[1] ** -0.5
        matrix.data.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))


def batches(arguments: argparse.Namespace) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (arguments.samples, arguments.length)
    for _ in range(arguments.steps):
        yield torch.randint(0, SHAPES[arguments.shape]["vocab_size"], size, generator=generator)


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    side = arguments.side
    import torch

    # Not part of the first step: what is imported once.
    for package in PACKAGES[side]:
        importlib.import_module(package)
    begin = time.perf_counter()
    if side == "lorica":
        from lorica.kernels.pool import install_pool

        install_pool()
    compiling = time.perf_counter() - begin
    model = build(arguments.shape, arguments.dtype, arguments.layers)
    loaded = resident_bytes("VmRSS")
    losses, seconds, begin = [], [], time.perf_counter() - compiling
    if side == "lorica":
        step = prepare_lorica(model, checkpointing=arguments.checkpointing)
    else:
        step = prepare_peft(model, checkpointing=arguments.checkpointing, compiled=side == "peft-compiled")
    for ids in batches(arguments):
        losses.append(step(ids))
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    peak = resident_bytes("VmHWM")
    return {
        "first": seconds[0], "seconds": seconds[1:], "losses": losses, "peak": peak, "growth": peak - loaded,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def measure(arguments: argparse.Namespace, folder: str) -> Results:
    """Run the sides, in turns."""
    # What `lorica` sets for itself; all sides get it, since it helps all where the machine has other work.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    if arguments.cold:
        environment["XDG_CACHE_HOME"] = folder
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--dtype", arguments.dtype]
    results: Results = {side: [] for side in arguments.sides}
    for _ in range(arguments.rounds):
        for side, found in results.items():
            child = [*command, "--side", side]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def summarize(arguments: argparse.Namespace, results: Results, floor: float) -> list[dict[str, Any]]:
    """A row for each side."""
    tokens = arguments.samples * arguments.length
    work = {key: getattr(arguments, key) for key in ("shape", "dtype", "layers", "samples", "length", "checkpointing")}
    rows = []
    for side, runs in results.items():
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        peak, growth = (max(run[key] for run in runs) for key in ("peak", "growth"))
        cold, *warm = (run["first"] for run in runs)
        ours = results[arguments.sides[0]][0]["losses"]
        difference = max(abs(a - b) for a, b in zip(ours, runs[0]["losses"], strict=True))
        later = rounded(statistics.median(warm)) if warm else ""
        rows.append({
            **work, "tokens": tokens, "threads": runs[0]["threads"], "side": side, "seconds": rounded(seconds),
            "peak_bytes": peak,
            "growth_bytes": growth, "first_seconds": rounded(cold), "first_seconds_later": later,
            "loss_difference": rounded(difference), "floor_seconds": rounded(floor),
        })  # fmt: skip
        print(
            f"{side:13} {seconds:7.3f} s a step {tokens / seconds:7.0f} tokens/s, {floor / seconds:4.0%} of the floor; "
            f"peak {peak / 1e9:5.2f} GB, {growth / 1e9:5.2f} GB of it above the loaded model; "
            f"first step {cold:.1f} s{f', later {later} s' if warm else ''}"
        )
        print(f"{'':13} losses {' '.join(f'{loss:.4f}' for loss in runs[0]['losses'][:8])}")
    return rows


def compare(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> bool:
    """Say how the first side stands to each of the others, and whether their losses agree."""
    ours, *others = rows
    again = ", activations computed again" if arguments.checkpointing else ""
    cut = f" cut to {arguments.layers} layers" if arguments.layers else ""
    work = f"step {arguments.shape}{cut}, {arguments.dtype}, {arguments.samples} x {arguments.length}{again}"
    tolerance, is_equal = TOLERANCES[arguments.dtype], True
    for row in others:
        is_equal &= row["loss_difference"] <= tolerance
        note = f"losses within {row['loss_difference']:.1e} over {arguments.steps} steps"
        if arguments.cold:
            note += f"; first step {ours['first_seconds']} s, later {ours['first_seconds_later']} s"
            note += f", {row['side']} {row['first_seconds']} s, later {row['first_seconds_later']} s"
        print(
            f"{ours['side']}: {row['seconds'] / ours['seconds']:.2f} x as fast as {row['side']}, "
            f"{ours['peak_bytes'] / row['peak_bytes']:.0%} of the peak memory, "
            f"{ours['growth_bytes'] / row['growth_bytes']:.0%} of the growth; {note} (tolerance {tolerance})"
        )
        announce(Comparison(
            work, "s a step", ours["seconds"], row["seconds"], row["side"], ours["peak_bytes"], row["peak_bytes"],
            ours["floor_seconds"], note,
        ))  # fmt: skip
    return is_equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument("--steps", type=int, default=4, help="steps in a process, at least 2; the first warms up")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    as_auto = "auto: as model.dtype: auto takes it for a bfloat16 base, so float32 where bfloat16 is emulated"
    parser.add_argument("--dtype", choices=("auto", *TOLERANCES), default="auto", help=as_auto)
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again in backward")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["lorica", "peft"])
    parser.add_argument("--cold", action="store_true", help="begin without anything compiled before")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    if arguments.dtype == "auto":
        arguments.dtype = auto_dtype()
    print(f"{processor()}, {os.cpu_count()} cores, {arguments.dtype}")
    flops = step_flops(
        make_config(arguments.shape, arguments.layers), [arguments.length] * arguments.samples, rank=RANK,
        checkpointing=arguments.checkpointing,
    )  # fmt: skip
    before = measure_ceiling(arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, folder)
    # A busy machine gives less: the better of two is nearer to what it can.
    ceiling = max(before, measure_ceiling(arguments.dtype))
    floor = flops.total / ceiling
    print(f"{flops.total / 1e9:,.0f} GFLOP over {ceiling / 1e9:,.0f} GFLOP/s: the floor is {floor:.3f} s a step")
    rows = summarize(arguments, results, floor)
    append_rows("train_step.csv", rows)
    if not compare(arguments, rows):
        raise SystemExit("the losses differ by more than the tolerance")


if __name__ == "__main__":
    main()
