"""Real training steps in a process of their own: what `lorica plan --measure` sets beside the prediction.

A fresh process, because this one's memory would count otherwise. It does as `recipes/train.py` and the command line do.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorica.config import RunConfig
from lorica.errors import LoricaError
from lorica.kernels.pool import install_pool
from lorica.methods.attach import adapters, attach, trainable_parameters, with_whole
from lorica.models.load import EMBEDDED, load_model, load_with_head, pick_device
from lorica.models.loss import make_loss
from lorica.models.tasks import CLASSIFICATION, TASKS
from lorica.recipes.intrinsic import with_heads
from lorica.recipes.rehearsing import Setting, batch_lengths, num_micro_batches, num_restarts
from lorica.training.metrics import peak_memory_bytes
from lorica.training.offload import checkpoint_layers
from lorica.training.optim import clip_gradients, make_optimizer
from lorica.training.paged import Tiers
from lorica.training.rehearsal import Rehearsal, example_batch

_NUM_STEPS = 3
"""The first one builds kernels; the fastest of the others tells the speed."""


@dataclass(frozen=True)
class Measured:
    """Real steps beside the prediction: growth of peak memory, and the fastest step.

    `ratio` is predicted / measured memory; `seconds_per_micro_batch` include a share of the optimizer.
    """

    peak_bytes: int
    ratio: float
    seconds_per_micro_batch: float
    tokens_per_second: float


def measure_run(config: RunConfig, setting: Setting, rehearsal: Rehearsal) -> Measured:
    """Real steps in a process of its own, so that neither this one's memory nor its caches count."""
    method = with_heads(config.method, setting.num_components)
    order = {
        "config": config.model_copy(update={"method": method}).model_dump_json(),
        "lengths": batch_lengths(config, setting),
        "trained_fraction": setting.trained_fraction,
        "task": setting.task.name,
        "labels": list(setting.base.id2label.values()) if setting.task is CLASSIFICATION else [],
        "num_restarts": num_restarts(config, setting),
        "padded": setting.padded,
    }
    child = subprocess.run(
        [sys.executable, "-m", "lorica.recipes.measuring"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise LoricaError(f"--measure: the measuring process ended with {child.returncode}: {last}")
    found = json.loads(child.stdout.splitlines()[-1])
    return Measured(
        peak_bytes=found["peak_bytes"],
        ratio=rehearsal.peak_bytes / found["peak_bytes"],
        seconds_per_micro_batch=found["seconds"],
        tokens_per_second=rehearsal.num_tokens / found["seconds"],
    )


def _environment() -> dict[str, str]:
    # The command line sets the same (`cli.py`); a caller from Python may not have.
    spin = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "20000"}
    return {**spin, **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def measure_steps(text: str) -> None:
    """The measuring process: real steps on random tokens; prints the growth of its peak memory and a step's seconds.

    `text` is the JSON that `measure_run` writes. Growth counts from after a warm-up load of the embedded model, so that
    libraries that come in with the first model are not taken for this one's.
    """
    order = json.loads(text)
    config = RunConfig.model_validate_json(order["config"])
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    load_model(EMBEDDED, dtype=config.model.dtype, device=config.model.device, quant=config.model.quant)
    gc.collect()
    # Now, or this run would find the memory of the load before it.
    install_pool()
    _reset_peak()
    device = pick_device(config.model.device)
    before = peak_memory_bytes(device)

    model, head = load_with_head(
        config.model.base,
        dtype=config.model.dtype,
        device=config.model.device,
        revision=config.model.revision,
        task=order["task"],
        labels=order["labels"],
        quant=config.model.quant,
        double_quant=config.model.double_quant,
    )
    loss_fn = make_loss(model)
    attach(model, with_whole(config.method, head))
    for adapter in list(adapters(model).values()) * order["num_restarts"]:
        adapter.restart()
    elsewhere = Path(tempfile.gettempdir())
    checkpoint_layers(model, config.train.activation_checkpointing, elsewhere)
    trained = trainable_parameters(model.train())
    optimizer = make_optimizer(
        trained,
        lr=config.train.lr,
        betas=(config.train.beta1, config.train.beta2),
        epsilon=config.train.epsilon,
        weight_decay=config.train.weight_decay,
        bits=config.train.optimizer_bits,
        tiers=Tiers(config.train.optimizer_memory, 0, elsewhere),
    )
    batch = example_batch(
        order["lengths"],
        trained_fraction=order["trained_fraction"],
        padded=order["padded"],
        task=TASKS[order["task"]],
    )
    batch = replace(batch, input_ids=torch.randint_like(batch.input_ids, model.config.get_text_config().vocab_size))
    # A second micro batch finds the gradients of the first; further ones change nothing.
    repeats = min(2, num_micro_batches(config))
    seconds = []
    for _ in range(_NUM_STEPS):
        begin = time.perf_counter()
        for _ in range(repeats):
            loss = loss_fn(model, batch.to(device).model_inputs(), batch.targets)
            (loss / max(1, batch.num_targets)).backward()  # type: ignore[no-untyped-call]
            # Or its graph would live through the next forward pass.
            del loss
        clip_gradients(trained.values(), config.train.clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.perf_counter() - begin) / repeats)
    print(json.dumps({"peak_bytes": peak_memory_bytes(device) - before, "seconds": min(seconds)}))


def _reset_peak() -> None:
    # Where the kernel does not allow it the peak so far stands, and growth below it is not seen.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


if __name__ == "__main__":
    measure_steps(sys.stdin.read())
