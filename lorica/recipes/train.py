"""`lorica train`: rows and a base become an adapter that is proved to be what was trained.

The run folder:

    config.yaml  environment.json    what was asked for, and where it ran
    metrics.jsonl                    one row a step, evaluation rows between them
    checkpoints/                     whole, hashed, resumable; the best one always stays
    adapter/                         a PEFT folder: the best weights by evaluation loss, the last ones without
    report.md  curves.png            what came of it
    routing.json  routing.png        what the routers of HydraLoRA do: of the latest evaluation, then of the adapter
    result.json                      the same for programs; written last, so the adapter beside it is whole
    components.json                  what the rows consist of, where the method asks
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# Its import draws from Python's generator: before a run seeds that one, not when the first progress is shown.
import rich.style  # noqa: F401
import torch
from transformers import PretrainedConfig, PreTrainedModel

from lorica.config import Resolved, RunConfig, dump_yaml, load_config, values
from lorica.data.layouts import Layout, source_length
from lorica.data.sampler import Order
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import CheckpointError, ConfigError, DataError, DivergedError, ModelError
from lorica.files import read_json_object, write_json, write_text
from lorica.interop.folder import check_adapter_folder
from lorica.interop.peft import load_adapter, save_adapter
from lorica.kernels.pool import install_pool
from lorica.methods.attach import adapters, attach, detach, in_front, trainable_parameters, with_whole
from lorica.methods.hydra import HydraLoRA
from lorica.methods.method import MethodOptions
from lorica.models.load import base_fingerprint, context_length, load_with_head
from lorica.models.loss import LossFunction, make_loss
from lorica.models.tasks import SEQ2SEQ
from lorica.quant.linear import format_of, num_parameters
from lorica.recipes import console
from lorica.recipes.intrinsic import FILE as COMPONENTS
from lorica.recipes.intrinsic import Intrinsic, find_intrinsic, first_rows, with_heads
from lorica.recipes.opening import adapter_fault
from lorica.recipes.paging import host_memory
from lorica.recipes.preparing import PreparedRun, base_config, prepare
from lorica.recipes.proof import check_read_back, logits_of
from lorica.recipes.report import write_run_report
from lorica.recipes.tasks import RunTask
from lorica.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    find_checkpoints,
    latest_valid,
    read_checkpoint,
    restore_trained,
)
from lorica.training.energy import UNMEASURED
from lorica.training.identity import check_identity
from lorica.training.lock import RunLock
from lorica.training.loop import LoopResult, is_finished, run_loop
from lorica.training.offload import checkpoint_layers
from lorica.training.step import LoopOptions

if TYPE_CHECKING:
    from lorica.recipes.plan import PlanReport
    from lorica.recipes.routing import Look

RESULT = "result.json"
SHOWN_LABELS = 8


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to. Sizes in bytes, times in seconds, losses in nats a token.

    energy_joules: drawn in steps, as `seconds` are spent in them; None where that cannot be read. energy_source: the
    counters that were read, or why there are none (`training/energy.py`).
    """

    output: str
    adapter: str
    status: str
    steps: int
    train_loss: float | None
    eval_loss: float | None
    adapter_step: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    train_samples: int
    eval_samples: int
    resumed_from_step: int | None
    read_back_difference: float | None
    energy_joules: float | None = None
    energy_source: str = UNMEASURED.source


@dataclass(frozen=True)
class _Work:
    """What there is to train on, before any weight is read.

    method: as it is attached. identity: of the run, without its model.
    """

    data: PreparedRun
    order: Order
    identity: dict[str, Any]
    method: MethodOptions
    intrinsic: Intrinsic | None


def train(
    config: RunConfig | Resolved | str | Path,
    *,
    resume: str | Path | None = None,
    dry_run: bool = False,
    allow_data_change: bool = False,
    stop_at: int | None = None,
    data: PreparedRun | None = None,
) -> TrainResult | PlanReport:
    """Train an adapter as `config` says.

    Args:
        config: a configuration, with or without the origin of its values, or the path of a run.yaml or of a run folder.
        resume: None starts anew, `"auto"` goes on from the newest checkpoint that is whole (or starts anew where there
            is none), a path goes on from that checkpoint.
        dry_run: read and check everything, predict memory and time, train and write nothing; gives the plan.
        allow_data_change: resume although the data is not what it was.
        stop_at: pause after this many steps, with the adapter so far. The schedule stays that of the whole run, and
            resuming goes on with it as if it had not paused.
        data: what `prepare` gave for this configuration's rows; None: it is called here.

    Raises:
        LoricaError: each kind with its own exit code; see `errors.py`.
    """
    resolved = config if isinstance(config, RunConfig | Resolved) else load_config(config)
    config = resolved.config if isinstance(resolved, Resolved) else resolved
    if isinstance(resolved, Resolved):
        _refuse_moved(resolved)
    if dry_run:
        from lorica.recipes.plan import plan

        return plan(config, require_data=True)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    output = Path(config.train.output)
    with RunLock(output):
        check_adapter_folder(output / "adapter")
        checkpoint = _find_checkpoint(output / "checkpoints", resume)
        work = _lay_out(config, data, checkpoint)
        if checkpoint is not None:
            earlier = _nothing_to_do(output, checkpoint, work, allow_data_change)
            if earlier is not None:
                return earlier
        model, result, look = _run(config, resolved, output, work, checkpoint, stop_at)
        return _finish(model, output, work, result, checkpoint, look)


def _refuse_moved(run: Resolved) -> None:
    """Refuse a run folder that was moved: its config.yaml names the old place, where the run would start anew."""
    file, output = Path(run.origin["train.output"].rpartition(":")[0]), Path(run.config.train.output)
    # What `_write_beginning` leaves; a configuration of one's own may be called config.yaml too.
    is_run = file.name == "config.yaml" and file.with_name("environment.json").is_file()
    if is_run and file.parent.resolve() != output.resolve():
        raise ConfigError(
            f"{file} says train.output: {output}, but the run stands in {file.parent}: it was moved or copied. "
            f"Say where to go on: train.output={file.parent}."
        )


def _lay_out(config: RunConfig, data: PreparedRun | None, checkpoint: Checkpoint | None) -> _Work:
    """The rows, their order, and what a checkpoint of this run must agree with."""
    base = base_config(config.model)
    data = prepare(config) if data is None else data
    _refuse_misfits(config, data, base)
    data = data.for_method(config.method, base)
    if data.padding is not None:
        console.log(data.padding)
    if data.labels:
        named = ", ".join(data.labels[:SHOWN_LABELS]) + (", ..." if len(data.labels) > SHOWN_LABELS else "")
        console.log(f"{len(data.labels):,} classes: {named}")
    order = make_order(config, data.train, data.layout.padded)
    identity = _identity(config, data)
    # In the folder that the checkpoint is of.
    intrinsic = find_intrinsic(config, data, None if checkpoint is None else checkpoint.path.parent.parent / COMPONENTS)
    if intrinsic is None:
        return _Work(data, order, identity, config.method, None)
    method = with_heads(config.method, intrinsic.components.num)
    return _Work(data, order, {**identity, "components": intrinsic.identity}, method, intrinsic)


def make_order(config: RunConfig, dataset: TokenizedDataset, padded: bool) -> Order:
    """The order of a run's training samples, which also says how many steps it has."""
    return Order(
        dataset.lengths,
        seed=config.train.seed,
        batch_tokens=config.train.batch_tokens,
        epochs=config.train.epochs,
        padded=padded,
        max_steps=config.train.max_steps,
    )


def _nothing_to_do(output: Path, checkpoint: Checkpoint, work: _Work, allow_data_change: bool) -> TrainResult | None:
    """The result of a run that had finished, or None where it goes on, with what changed said aloud.

    CheckpointError for a checkpoint of another run.
    """
    saved = {section: values for section, values in checkpoint.state["identity"].items() if section != "model"}
    for warning in check_identity(saved, work.identity, allow_data_change=allow_data_change):
        console.log(f"Resuming with a change: {warning}")
    earlier = _saved_result(output)
    if earlier is not None and is_finished(checkpoint, work.order.num_steps):
        fault = adapter_fault(output / "adapter")
        if fault is None:
            console.log(f"Nothing to do: {output} finished at step {checkpoint.step}.")
            return replace(earlier, status="nothing to do", resumed_from_step=checkpoint.step)
        console.log(f"{fault} It is written again.")
    console.log(f"Going on from {checkpoint.path}.")
    later = [p for p in find_checkpoints(output / "checkpoints") if p.name > checkpoint.path.name]
    if later:
        console.log(f"{len(later)} later checkpoints make way for the new ones.")
    return None


def _run(
    config: RunConfig,
    resolved: Resolved | RunConfig,
    output: Path,
    work: _Work,
    checkpoint: Checkpoint | None,
    stop_at: int | None,
) -> tuple[PreTrainedModel, LoopResult, Look | None]:
    """Load, attach, train: the model with its last weights, what the loop came to, and how to look at its routers."""
    settings, data = config.train, work.data
    budget = settings.micro_batch_tokens or settings.batch_tokens
    console.log(f"{len(data.train):,} training samples, {work.order.num_steps:,} steps")
    install_pool()
    model, head = load_with_head(
        config.model.base,
        dtype=config.model.dtype,
        device=config.model.device,
        revision=config.model.revision,
        task=data.task.task.name,
        labels=data.labels,
        seed=settings.seed,
        quant=config.model.quant,
        double_quant=config.model.double_quant,
        method=work.method,
    )
    method = with_whole(work.method, head)
    held = {"fingerprint": base_fingerprint(model, head), "dtype": str(model.dtype), "quant": format_of(model)}
    identity = {**work.identity, "model": held}
    if checkpoint is not None:
        check_identity({"model": checkpoint.state["identity"]["model"]}, {"model": identity["model"]})
    loss_fn = make_loss(model)
    seed_everything(settings.seed)
    attach(model, method)
    if beside := [name for name, adapter in adapters(model).items() if adapter.is_beside]:
        console.log(f"Trained beside the adapters, and saved with them: {', '.join(beside)}")
    store = checkpoint_layers(model, settings.activation_checkpointing, output)
    if store is not None:
        console.log(f"What checkpointed layers keep waits in {store.where}")
    if checkpoint is None and method.num_start_batches:
        _start_from_data(model, method, loss_fn, config, work)
    look = _watch(model, loss_fn, work, budget) if isinstance(method, HydraLoRA) else None
    _write_beginning(output, config, resolved, model.device, identity["model"]["dtype"])
    if work.intrinsic is not None:
        work.intrinsic.save(output)
    result = run_loop(
        model,
        loss_fn,
        data.train,
        work.order,
        folder=output,
        options=_loop_options(config, data.layout),
        evaluate=make_evaluation(model, loss_fn, data, budget, look, output),
        resume=checkpoint,
        identity=identity,
        stop_at=stop_at,
    )
    return model, result, look


def _watch(model: PreTrainedModel, loss_fn: LossFunction, work: _Work, budget: int) -> Look | None:
    """How to look at the model's routers; None where there are none to be watched."""
    from lorica.recipes.routing import is_routed, rows_to_watch, watch_routing

    if not is_routed(model):
        return None
    data, watched = work.data, rows_to_watch(work.data, work.intrinsic)
    return partial(watch_routing, model, loss_fn, data.task, data.layout, watched, budget)


def _start_from_data(
    model: PreTrainedModel, method: MethodOptions, loss_fn: LossFunction, config: RunConfig, work: _Work
) -> None:
    """Start the adapters from the data of the run's first steps, or from the first rows of each component."""
    data, budget = work.data, config.train.micro_batch_tokens or config.train.batch_tokens
    # A start looks at every token of a batch that has no mask.
    layout = data.layout.without_filler()
    if work.intrinsic is None:
        steps = range(min(method.num_start_batches, work.order.num_steps))
        parts = [(work.order.batch(step), 0) for step in steps]
    else:
        num_tokens = method.num_start_batches * config.train.batch_tokens
        parts = first_rows(work.intrinsic, work.order, data.train.lengths, num_tokens)
    batches = [(batch, label) for rows, label in parts for batch in layout.batches(data.train, rows, budget)]
    console.log(f"Starting the adapter from {sum(b.num_tokens for b, _ in batches):,} tokens of the training data")
    with_targets = [(batch.to(model.device), label) for batch, label in batches if batch.num_targets]
    method.start(model, loss_fn, [(batch.model_inputs(), batch.targets, label) for batch, label in with_targets])


def _finish(
    model: PreTrainedModel,
    output: Path,
    work: _Work,
    result: LoopResult,
    checkpoint: Checkpoint | None,
    look: Look | None,
) -> TrainResult:
    """Save the best weights and prove them, then report; result.json comes last."""
    data = work.data
    adapter_step = _take_best(model, output, result)
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    num_total = num_parameters(model)
    # Before the adapter is read back, which takes these routers off the model.
    routing = None if look is None else look()[1]
    difference = _save_proved(model, output / "adapter", data)
    done = TrainResult(
        output=str(output),
        adapter=str(output / "adapter"),
        status=_status(result, work.order.num_steps),
        steps=result.step,
        train_loss=result.loss,
        eval_loss=result.best_loss,
        adapter_step=adapter_step,
        tokens=result.tokens,
        seconds=result.seconds,
        tokens_per_second=result.tokens / result.seconds if result.seconds else 0.0,
        peak_memory_bytes=result.peak_memory_bytes,
        trainable_parameters=num_trainable,
        total_parameters=num_total,
        train_samples=len(data.train),
        eval_samples=0 if data.eval is None else len(data.eval),
        resumed_from_step=None if checkpoint is None else checkpoint.step,
        read_back_difference=difference,
        energy_joules=result.energy.joules,
        energy_source=result.energy.source,
    )
    sections: Sequence[str] = ()
    if routing is not None:
        from lorica.recipes.heat_map import write_routing

        sections = write_routing(output, routing)
    write_run_report(output, asdict(done), sections)
    write_json(output / RESULT, asdict(done))
    return done


def _status(result: LoopResult, num_steps: int) -> str:
    if result.stopped_early:
        return "stopped early"
    return "finished" if result.step >= num_steps else "paused"


def seed_everything(seed: int) -> None:
    """Seed every generator that anything here draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def make_evaluation(
    model: PreTrainedModel,
    loss_fn: LossFunction,
    data: PreparedRun,
    micro_batch_tokens: int,
    look: Look | None,
    output: Path,
) -> Callable[[], Mapping[str, float]] | None:
    """A function that measures the task's scores on the evaluation rows, or None without such.

    look: measures them too and watches the routers, which go to `output` / routing.json and as means to the scores.
    """
    if data.eval is None:
        return None
    if look is not None:
        from lorica.recipes.routing import scores_and_routing

        return lambda: scores_and_routing(look, output)
    everything = np.arange(len(data.eval), dtype=np.int64)
    batches = data.layout.batches(data.eval, everything, micro_batch_tokens)
    return lambda: data.task.scores(model, loss_fn, batches)


def _find_checkpoint(folder: Path, resume: str | Path | None) -> Checkpoint | None:
    if resume is None:
        if find_checkpoints(folder):
            raise CheckpointError(
                f"{folder} holds the checkpoints of an earlier run. Go on with --resume auto, or choose another "
                "train.output."
            )
        return None
    if str(resume) == "auto":
        return latest_valid(folder, console.log)
    path = Path(resume)
    checkpoint = read_checkpoint(path)
    if path.resolve().parent != folder.resolve() and find_checkpoints(folder):
        # Those of two runs side by side, one's best could be taken for the other's.
        raise CheckpointError(
            f"{folder} holds the checkpoints of another run than {path}. Choose another train.output."
        )
    return checkpoint


def _refuse_misfits(config: RunConfig, data: PreparedRun, base: PretrainedConfig) -> None:
    """Refuse samples that the base has no positions or no tokens for, before its weights are read."""
    parts = [part for part in (data.train, data.eval) if part is not None]
    longest = max(_longest(part, data.task) for part in parts)
    context, base = context_length(base), base.get_text_config()
    virtual = config.method.num_virtual_ids + config.method.position_offset
    if context and virtual > context - 2:
        raise ConfigError(
            f"method.num_virtual_tokens is {virtual:,}, and {config.model.base} takes {context:,} tokens in all: no "
            "room is left for a row."
        )
    if context and longest + virtual > context:
        beside = f" beside {virtual:,} virtual ones" if virtual else ""
        raise DataError(
            f"The longest sample has {longest:,} tokens, and {config.model.base} takes {context - virtual:,}{beside}. "
            f"Set data.max_length={context - virtual}; data.too_long says what becomes of longer rows."
        )
    highest = max(int(part.input_ids.max()) for part in parts)
    if highest >= base.vocab_size:
        raise ModelError(
            f"{config.model.base}: its tokenizer makes the token {highest:,}, but its vocabulary has "
            f"{base.vocab_size:,}. The tokenizer belongs to another model."
        )


def _longest(dataset: TokenizedDataset, task: RunTask) -> int:
    """Tokens of the longest sample; an encoder-decoder reads and writes its two parts apart."""
    if task.task is not SEQ2SEQ:
        return int(dataset.lengths.max())
    parts = [(source_length(labels), len(labels)) for _, labels in (dataset[i] for i in range(len(dataset)))]
    return max(max(source, whole - source) for source, whole in parts)


def _identity(config: RunConfig, data: PreparedRun) -> dict[str, Any]:
    """What a checkpoint must agree with; `settings` may change, said aloud."""
    train = config.train.model_dump(
        exclude={
            "output",
            "seed",
            "batch_tokens",
            "threads",
            "keep_checkpoints",
            "log_every",
            "optimizer_memory",
            "optimizer_host_memory",
        }
    )
    return {
        "method": values(config)["method"],
        "data": {
            "train": data.train.fingerprint(),
            "eval": None if data.eval is None else data.eval.fingerprint(),
            **({"labels": list(data.labels)} if data.labels else {}),
        },
        "order": {"seed": config.train.seed, "batch_tokens": config.train.batch_tokens, "padded": data.layout.padded},
        "settings": train,
    }


def _loop_options(config: RunConfig, layout: Layout) -> LoopOptions:
    t = config.train
    return LoopOptions(
        lr=t.lr,
        micro_batch_tokens=t.micro_batch_tokens or t.batch_tokens,
        schedule=t.schedule,
        warmup=t.warmup,
        min_lr=t.min_lr,
        restart_every=t.restart_every,
        clip=t.clip,
        weight_decay=t.weight_decay,
        betas=(t.beta1, t.beta2),
        epsilon=t.epsilon,
        eval_every=t.eval_every,
        save_every=t.save_every,
        keep_checkpoints=t.keep_checkpoints,
        early_stopping=t.early_stopping,
        on_nan=t.on_nan,
        log_every=t.log_every,
        optimizer_bits=t.optimizer_bits,
        optimizer_memory=t.optimizer_memory,
        optimizer_host_memory=host_memory(t.optimizer_host_memory),
        layout=layout,
    )


def _write_beginning(
    output: Path, config: RunConfig, resolved: Resolved | RunConfig, device: torch.device, dtype: str
) -> None:
    text = resolved.dump_yaml() if isinstance(resolved, Resolved) else dump_yaml(config)
    # An earlier result stands for a finished run, which this one is not yet.
    (output / RESULT).unlink(missing_ok=True)
    write_text(output / "config.yaml", text)
    import transformers

    import lorica

    write_json(
        output / "environment.json",
        {
            "lorica": lorica.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "dtype": dtype.removeprefix("torch."),
        },
    )


def _take_best(model: PreTrainedModel, output: Path, result: LoopResult) -> int:
    """Put the weights with the lowest evaluation loss into the model; the step that they are from."""
    if result.best_step is None or result.best_step == result.step:
        return result.step
    best = read_checkpoint(checkpoint_path(output / "checkpoints", result.best_step))
    restore_trained(model, best.tensors["trainable"])
    return result.best_step


def _save_proved(model: PreTrainedModel, folder: Path, data: PreparedRun) -> float:
    """Save the adapter, read it back onto the bare base, and compare logits; the largest difference, 0 on a CPU."""
    # The row without what `logits_of` puts in front of it.
    row = data.train[0][0][len(in_front(model)[0]) :]
    ids = torch.from_numpy(row[:64].astype(np.int64))[None]
    before = logits_of(model, ids)
    if not bool(before.isfinite().all()):
        # The weights can be finite still: a step that was far too long.
        raise DivergedError("The trained model's logits are not finite, so no adapter was saved. Try a lower train.lr.")
    save_adapter(model, folder)
    load_adapter(detach(model), folder)
    return check_read_back(before, logits_of(model, ids), model.device, str(folder))


def _saved_result(output: Path) -> TrainResult | None:
    """What a finished run left; None where it is missing, or of a version with other fields."""
    try:
        return TrainResult(**read_json_object(output / RESULT))
    except (OSError, ValueError, TypeError):
        return None
