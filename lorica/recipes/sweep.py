"""`lorica sweep`: the same run with several settings, one after another, and the best of them as a run.yaml.

Successive halving: all arms are trained to a ninth of their steps, the best third of them to a third, and the best of
those to the end (Jamieson & Talwalkar 2016, arXiv:1502.07943; a third as in Hyperband, arXiv:1603.06560). An arm is
paused and resumed, never trained again: its learning rates are those of the whole run, and where it ends is bit for bit
where it would have ended alone. Rungs lie on evaluations that the run makes anyway, so not even the log differs.

    sweep.json            how far each arm is; the same command goes on from there
    <arm>/                an ordinary run folder, with the adapter so far
    sweep.csv  sweep.png  the table and its picture
    best.yaml             run.yaml with the best arm's values

What it gives up: an arm whose loss only falls late, when its learning rate does, may be stopped although it would have
won (`--no-halving` trains all to the end). All arms share a process, so the peak memory of an arm is not told.
"""

from __future__ import annotations

import csv
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.errors import ConfigError, DivergedError, DoesNotFitError, LoricaError, StoppedError, TargetError
from lorica.files import write_text
from lorica.recipes import console
from lorica.recipes.arms import Arm, in_folder, make_arms, short_keys
from lorica.recipes.merge import check_free
from lorica.recipes.pictures import draw_sweep
from lorica.recipes.preparing import PreparedRun, base_config, prepare
from lorica.recipes.rehearsing import check_targets
from lorica.recipes.sweep_state import STATE, SweepState
from lorica.recipes.tasks import run_task
from lorica.recipes.train import make_order, train
from lorica.strict_yaml import dump_value
from lorica.training.lock import RunLock
from lorica.training.metrics import read_metrics

ETA = 3
MAX_RUNGS = 2
"""Rungs before the end. A third one, at 1/27 of the steps, would judge arms that are hardly warm."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        values: of the swept keys.
        status: `finished`, `stopped` (others were better), `diverged` or `does not fit`.
        step: optimizer steps done, of `num_steps`.
        eval_loss: the lowest so far, at `best_step`, in nats a token; None for an arm that failed.
        reason: why it failed.
    """

    name: str
    folder: str
    values: dict[str, Any]
    status: str
    step: int
    num_steps: int
    eval_loss: float | None
    best_step: int | None
    train_loss: float | None
    tokens: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class SweepResult:
    """All arms, the best first, and what `lorica train` takes to repeat that one."""

    output: str
    best: str
    best_config: str
    arms: list[ArmResult]


@dataclass(frozen=True)
class _Job:
    """An arm and what it trains on."""

    arm: Arm
    data: PreparedRun
    num_steps: int

    @property
    def name(self) -> str:
        return self.arm.name

    def step_at(self, divisor: int) -> int:
        """The first evaluation at or after 1/divisor of the steps; the last step for 1."""
        every = self.arm.run.config.train.eval_every
        return min(self.num_steps, math.ceil(self.num_steps / (divisor * every)) * every)


def sweep(
    path: str | Path,
    axes: Sequence[str],
    *,
    output: str | Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    halving: bool = True,
) -> SweepResult:
    """Train an arm for every combination of values, stop those that fall behind, and print the table.

    Called again with the same arguments, it goes on where it was.

    Args:
        path: run.yaml, or a run folder.
        axes: `section.key=value,value`; a key with one value is the same for all arms.
        output: folder of the sweep; None: the run's `train.output` with `-sweep` behind it.
        samples: run this many arms of the grid, drawn with `seed`.
        halving: stop arms early; False trains all of them to the end.

    Raises:
        ConfigError: faults of axes or configurations, no evaluation data, or `output` holds something else.
        TargetError: an arm's targets match nothing.
        LoricaError: no arm came to its end.
    """
    arms = make_arms(path, axes, output=None if output is None else Path(output), samples=samples, seed=seed)
    folder = arms[0].folder.parent
    if not (folder / STATE).exists():
        check_free(folder)
    jobs = _prepare(arms)
    with RunLock(folder):
        state = SweepState(folder, arms, _evaluation_rows(jobs[0]))
        _run(jobs, state, _rungs(jobs) if halving else [1])
        results = sorted((_result(job, state) for job in jobs), key=_rank)
        # An arm whose log was tampered with may have no loss.
        best = next((r for r in results if r.status == "finished" and r.eval_loss is not None), None)
        _write(folder, results)
        _show(folder, results)
        if best is None:
            raise LoricaError(
                f"No arm came to its end, so there is no best one; {folder / 'sweep.csv'} has the reasons."
            )
        arm = next(arm for arm in arms if arm.name == best.name)
        write_text(folder / "best.yaml", in_folder(arm.run, folder / "best").dump_yaml())
    console.log(f"Best: {best.name}, evaluation loss {best.eval_loss:.4g}. Its run: {best.folder}")
    console.log(f"Its configuration: {folder / 'best.yaml'}. The picture: {folder / 'sweep.png'}")
    return SweepResult(str(folder), best.name, str(folder / "best.yaml"), results)


def _prepare(arms: Sequence[Arm]) -> list[_Job]:
    """Read the rows once for all arms that read the same; ConfigError where the arms' losses cannot be compared."""
    _check_targets(arms)
    prepared: dict[str, PreparedRun] = {}
    jobs = []
    for arm in arms:
        config = arm.run.config
        # A share for evaluation is drawn by the run's seed.
        seed = config.train.seed if isinstance(config.data.eval, float) else None
        what = repr((config.model.base, config.model.revision, config.model.task, config.data, seed))
        base = base_config(config.model)
        if what not in prepared:
            prepared[what] = prepare(config)
        data = prepared[what]
        order = make_order(config, data.for_method(config.method, base).train, data.layout.padded)
        jobs.append(_Job(arm, data, order.num_steps))
    other = next((job for job in jobs if _evaluation_rows(job) != _evaluation_rows(jobs[0])), None)
    if other is not None:
        raise ConfigError(
            f"{jobs[0].name} and {other.name} would be evaluated on different tokens, so their losses cannot "
            "be compared. Name a file in data.eval, and sweep nothing that changes its tokens, as a template does."
        )
    return jobs


def _check_targets(arms: Sequence[Arm]) -> None:
    """TargetError, with all arms whose method finds nothing to wrap, before rows are read and anything is trained."""
    reasons: dict[str, str] = {}
    for arm in arms:
        config = arm.run.config
        key = repr((config.model, config.method))
        if key in reasons:
            continue
        base = base_config(config.model)
        try:
            reasons[key] = ""
            check_targets(config, base, run_task(config, base).task)
        except TargetError as error:
            reasons[key] = f"{arm.name}: {error}"
    if faults := [reason for reason in reasons.values() if reason]:
        raise TargetError("\n".join(faults))


def _evaluation_rows(job: _Job) -> str:
    assert job.data.eval is not None
    return job.data.eval.fingerprint()


def _rungs(jobs: Sequence[_Job]) -> list[int]:
    """What the steps are divided by at each rung, as in [9, 3, 1]; only rungs with an evaluation of their own."""
    divisors = [1]
    while len(jobs) >= divisors[0] * ETA and len(divisors) <= MAX_RUNGS:
        if any(job.step_at(divisors[0] * ETA) >= job.step_at(divisors[0]) for job in jobs):
            console.log(
                f"No arm is judged at 1/{divisors[0] * ETA} of its steps: train.eval_every is too long for that."
            )
            break
        divisors.insert(0, divisors[0] * ETA)
    return divisors


def _run(jobs: Sequence[_Job], state: SweepState, rungs: Sequence[int]) -> None:
    """Successive halving. Scores come from the arms' logs, so what has been done before is only read again."""
    alive = list(jobs)
    for divisor in rungs:
        for number, job in enumerate(alive, 1):
            _advance(job, state, job.step_at(divisor), f"Arm {number} of {len(alive)}")
        if divisor > 1:
            scores = {job.name: _score(job, state, job.step_at(divisor)) for job in alive}
            ranked = sorted((job for job in alive if scores[job.name] < math.inf), key=lambda job: scores[job.name])
            alive = ranked[: math.ceil(len(scores) / ETA)]
            names = "; ".join(job.name for job in alive) or "none"
            console.log(f"After 1/{divisor} of the steps go on, of {len(scores)} arms: {names}")
    # Those that went on may all have diverged since: then the next best gets its turn.
    while not any(_is_finished(job, state) for job in jobs):
        waiting = [job for job in jobs if state.failure(job.name) is None]
        if not waiting:
            return
        job = min(waiting, key=lambda job: (-state.step(job.name), _score(job, state, state.step(job.name))))
        _advance(job, state, job.num_steps, "Instead of those that failed")


def _advance(job: _Job, state: SweepState, step: int, title: str) -> None:
    """Train an arm up to `step`, if it is not there yet."""
    if state.failure(job.name) is not None or state.step(job.name) >= step:
        return
    console.log(f"{title}: {job.name}, to step {step:,} of {job.num_steps:,}")
    failure = None
    try:
        train(job.arm.run, resume="auto", stop_at=step, data=job.data)
    except StoppedError as error:
        number = error.exit_code - 128
        raise StoppedError(f"{job.name}: stopped, with a checkpoint. The same command goes on.", number) from error
    except DivergedError as error:
        failure = ("diverged", str(error))
    except (DoesNotFitError, MemoryError, torch.OutOfMemoryError) as error:
        failure = ("does not fit", str(error) or type(error).__name__)
    if failure is None and _score(job, state, step) == math.inf:
        failure = ("diverged", "None of its evaluation losses is a finite number; lower train.lr.")
    if failure is not None:
        console.log(f"{job.name}: {failure[0]}. {failure[1]}")
    state.record(job.name, step=step, failure=failure)
    # Modules refer to each other in circles; the next arm needs the memory.
    gc.collect()


def _is_finished(job: _Job, state: SweepState) -> bool:
    return state.failure(job.name) is None and state.step(job.name) >= job.num_steps


def _score(job: _Job, state: SweepState, step: int) -> float:
    """The lowest evaluation loss up to `step`, which is that of the adapter; infinity where it failed by then."""
    if state.failure(job.name) is not None and state.step(job.name) <= step:
        return math.inf
    return min((loss for loss, at in _evaluations(job) if at <= step), default=math.inf)


def _evaluations(job: _Job) -> list[tuple[float, int]]:
    rows = read_metrics(job.arm.folder / "metrics.jsonl")
    return [(row["eval_loss"], row["step"]) for row in rows if row.get("eval_loss") is not None]


def _result(job: _Job, state: SweepState) -> ArmResult:
    file = job.arm.folder / "metrics.jsonl"
    # An arm may fail before its first step.
    rows = read_metrics(file) if file.is_file() else []
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    failure = state.failure(job.name)
    loss, step = (None, None) if failure else min(_evaluations(job), default=(None, None))
    status, reason = failure or ("finished" if _is_finished(job, state) else "stopped", "")
    return ArmResult(
        name=job.name,
        folder=str(job.arm.folder),
        values=job.arm.values,
        status=status,
        step=last.get("step", 0),
        num_steps=job.num_steps,
        eval_loss=loss,
        best_step=step,
        train_loss=last.get("loss"),
        tokens=last.get("tokens", 0),
        seconds=last.get("seconds", 0.0),
        reason=reason,
    )


def _rank(result: ArmResult) -> tuple[bool, bool, int, float]:
    """Finished arms by their loss, then the stopped ones, those that came far first, then those that failed."""
    finished = result.status == "finished"
    loss = math.inf if result.eval_loss is None else result.eval_loss
    return (not finished, result.eval_loss is None, 0 if finished else -result.step, loss)


def _write(folder: Path, results: Sequence[ArmResult]) -> None:
    """sweep.csv and sweep.png."""
    keys = list(results[0].values)
    facts = ["status", "step", "num_steps", "eval_loss", "best_step", "train_loss", "tokens", "seconds", "reason"]
    with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", *keys, *facts])
        for result in results:
            values = [dump_value(result.values[key]) for key in keys]
            writer.writerow([result.name, *values, *(getattr(result, fact) for fact in facts)])
    draw_sweep(results, folder / "sweep.png")


def _show(folder: Path, results: Sequence[ArmResult]) -> None:
    short = short_keys(list(results[0].values))
    rows = [
        [
            *(dump_value(value) for value in result.values.values()),
            None if result.eval_loss is None else f"{result.eval_loss:.4f}",
            result.best_step,
            f"{result.step:,}/{result.num_steps:,}",
            console.human_seconds(result.seconds),
            result.status,
        ]
        for result in results
    ]
    figures = ["eval loss", "at step", "steps", "time"]
    numbers = [word for key, word in short.items() if all(_is_number(result.values[key]) for result in results)]
    console.table(str(folder), [*short.values(), *figures, "status"], rows, numeric=[*numbers, *figures])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
