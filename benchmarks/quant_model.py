"""One side of a case of quant.py that takes a whole model: a process of its own, since peak memory is one's.

    python benchmarks/quant_model.py make 135m FOLDER           # a checkpoint of random weights, in bfloat16
    python benchmarks/quant_model.py train lorica-nf4 FOLDER --dtype float32
    python benchmarks/quant_model.py decode lorica-nf4 FOLDER --head int8
    python benchmarks/quant_model.py load bitsandbytes FOLDER --warm-up SMALL_FOLDER

Prints one JSON object. Sides: lorica-nf4, lorica (not quantised), bitsandbytes (transformers, and PEFT to train),
transformers (not quantised). The growth while loading is that of the kernel's VmHWM above what was resident before,
after a warm-up load of a small checkpoint of the same kind, so that imports do not count.
"""

from __future__ import annotations

import argparse
import json
import time
import types
from pathlib import Path
from typing import Any

from train_step import SHAPES, prepare_lorica, prepare_peft, resident_bytes

SHAPES |= {
    "warm-up": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1,
                "num_key_value_heads": 1, "vocab_size": 256, "tie_word_embeddings": True},
}  # fmt: skip
SIDES = ("lorica-nf4", "lorica", "bitsandbytes", "transformers")
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


def make(shape: str, folder: Path) -> dict[str, Any]:
    """Shards of at most 500 MB, as a checkpoint has them."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    return {"parameters": model.num_parameters()}


def load(side: str, folder: Path, dtype: str) -> Any:
    import torch

    if side.startswith("lorica"):
        import lorica

        return lorica.load_model(folder, dtype=dtype, device="cpu", quant="nf4" if side == "lorica-nf4" else None)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = getattr(torch, dtype)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    more = {"quantization_config": how} if side == "bitsandbytes" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **more)


def train(side: str, folder: Path, dtype: str, steps: int, samples: int, length: int) -> dict[str, Any]:
    import torch

    model = load(side, folder, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (samples, length), generator=generator)
    prepare = prepare_lorica if side.startswith("lorica") else prepare_peft
    step = prepare(model)
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - begin)
    # A single step is counted as it is; of several the first warms up.
    return {"seconds": seconds[1:] or seconds, "losses": losses}


def decode(side: str, folder: Path, dtype: str, head: str | None, tokens: int) -> dict[str, Any]:
    """Seconds a token: the difference between long answers and answers of two tokens, so without the prompt."""
    import torch
    from transformers import GenerationConfig

    from lorica.evaluate.generation import generate

    model = load(side, folder, dtype).eval()
    if head:
        from lorica.quant.head import quantize_head

        quantize_head(model, head)
    tokenizer: Any = types.SimpleNamespace(pad_token_id=0)

    def answer(count: int) -> float:
        begin = time.perf_counter()
        if side.startswith("lorica"):
            generate(model, tokenizer, [PROMPT], max_new_tokens=count, stop_ids=(), batch_size=1)
        else:
            config = GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=True)
            with torch.inference_mode():
                model.generate(input_ids=torch.tensor([PROMPT]), generation_config=config)
        return time.perf_counter() - begin

    model.generation_config.eos_token_id = None
    answer(2)
    short = min(answer(2) for _ in range(3))
    # Of what an answer passes through: all weights but the embedding, of which it reads a row.
    head_module = model.get_output_embeddings()
    read = {id(t): t for name, t in model.named_parameters() if not name.endswith("embed_tokens.weight")}
    read |= {id(t): t for t in head_module.parameters()}
    weights = sum(t.numel() * t.element_size() for t in read.values())
    return {"seconds": [(answer(tokens + 2) - short) / tokens for _ in range(3)], "bytes": weights}


def loading(side: str, folder: Path, dtype: str, warm_up: Path) -> dict[str, Any]:
    load(side, warm_up, dtype)
    # Makes the peak so far what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    begin = time.perf_counter()
    model = load(side, folder, dtype)
    seconds = time.perf_counter() - begin
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return {"seconds": [seconds], "growth": peak_bytes() - before, "bytes": size}


def peak_bytes() -> int:
    """The kernel's own mark. Not ru_maxrss, which a process inherits from the one that started it."""
    return resident_bytes("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("make", "train", "decode", "load"))
    parser.add_argument("side", help=f"one of {', '.join(SIDES)}; for make, one of {', '.join(SHAPES)}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--head")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--warm-up", type=Path)
    a = parser.parse_args()
    import torch

    from lorica.kernels.pool import install_pool

    if a.threads:
        torch.set_num_threads(a.threads)
    # As `lorica train` does. What loads is measured without: the pool keeps what it once held.
    if a.side.startswith("lorica") and a.case in ("train", "decode"):
        install_pool()
    if a.case == "make":
        result = make(a.side, a.folder)
    elif a.case == "train":
        result = train(a.side, a.folder, a.dtype, a.steps, a.samples, a.length)
    elif a.case == "decode":
        result = decode(a.side, a.folder, a.dtype, a.head, a.tokens)
    else:
        result = loading(a.side, a.folder, a.dtype, a.warm_up)
    print(json.dumps({**result, "peak": peak_bytes()}))


if __name__ == "__main__":
    main()
