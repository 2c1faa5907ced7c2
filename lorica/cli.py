"""The command line: one command a verb, which parses, calls its recipe, and leaves with the exit code of the outcome.

A recipe is imported when its command runs, so `lorica --help` loads no torch. stdout carries data and stderr everything
else; under `--json` stdout carries exactly one document, an error included. Exit codes are those of `lorica.errors`,
and 2 for a command line that cannot be parsed. It gives up rich's help pages, which would double the time of `--help`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorica.errors import LoricaError

if TYPE_CHECKING:
    from lorica.config import Resolved

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="run.yaml, or a run folder.", show_default=False)]
Target = Annotated[
    str, typer.Argument(metavar="CONFIG|FILE", help="run.yaml, or a file or folder of rows.", show_default=False)
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change values, as in train.lr=3e-4.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]

app = typer.Typer(
    name="lorica",
    help="Adapt a large model to your own data with low-rank adapters, on the machine you have.",
    epilog="Every command takes --json and --traceback. Begin: lorica quickstart, or lorica init --data rows.jsonl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data_app = typer.Typer(help="Look at the rows before they are trained on.", rich_markup_mode=None, no_args_is_help=True)
config_app = typer.Typer(help="Look at a configuration.", rich_markup_mode=None, no_args_is_help=True)
adapter_app = typer.Typer(help="Look at adapters and compute with them.", rich_markup_mode=None, no_args_is_help=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises."""
    # Read when torch starts its threads. By default a thread spins for milliseconds after each operation, which on a
    # machine with other work slows a training step 3 to 10 times; this long costs nothing on an idle one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does it: a character that the terminal's encoding lacks is escaped, and does not end the program.
        sys.stdout.reconfigure(errors="backslashreplace")
    # What happened, and not where in the source.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options, rest = words[:end], words[end:]
    with_traceback = "--traceback" in options or os.environ.get("LORICA_TRACEBACK", "0") not in ("", "0")
    words = [word for word in options if word != "--traceback"] + rest
    if arguments is None:
        # What is imported stays. Looking through it for garbage, at the start and again at the end, takes a second.
        gc.disable()
    try:
        code = app(args=words, prog_name="lorica", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt  # typer has turned it into a number, which is no report
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader left (`| head`). Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if with_traceback and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _report(error, as_json="--json" in options)
    finally:
        gc.enable()


if TYPE_CHECKING:
    UsageError = typer.BadParameter
else:
    # typer exports only this leaf of the tree, which is click's or its own copy of click's, by version.
    UsageError = typer.BadParameter.__base__


def _report(error: BaseException, *, as_json: bool) -> int:
    """Say what happened on stderr, under --json on stdout too; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    code, message = _outcome(error)
    if as_json:
        from lorica.recipes.console import print_json

        print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    if isinstance(error, UsageError):
        error.show()
    else:
        print(f"error: {message}", file=sys.stderr)
    return code


def _outcome(error: BaseException) -> tuple[int, str]:
    if isinstance(error, LoricaError):
        return error.exit_code, str(error)
    if isinstance(error, UsageError):
        return 2, error.format_message()
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted"
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))
    ):
        return 4, (
            f"memory ran out ({text or type(error).__name__}). Lower train.micro_batch_tokens, then data.max_length, "
            "or set train.activation_checkpointing=true; `lorica plan` predicts what fits"
        )
    if isinstance(error, OSError):
        return 1, text
    return 1, f"{type(error).__name__}: {text}\nThis should not happen; --traceback shows where it did"


def _finish(as_json: bool, recipe: Callable[[], object]) -> Any:
    """Run the recipe; under --json its prints go to stderr and its result to stdout."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if not as_json:
        return recipe()
    from lorica.recipes.console import print_json

    with contextlib.redirect_stdout(sys.stderr):
        result = recipe()
    print_json(result)
    return result


def _load(config: str, overrides: list[str] | None, *more: str) -> Resolved:
    from lorica.config import load_config

    return load_config(config, [*(overrides or []), *more])


def _show_version(wanted: bool) -> None:
    if wanted:
        from lorica import __version__

        print(f"lorica {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


@app.command(epilog="Example: lorica doctor")
def doctor(json: Json = False) -> None:
    """Say what this machine offers and what is missing."""
    from lorica.recipes.doctor import doctor

    if not _finish(json, doctor).ok:
        raise typer.Exit(1)


@app.command(epilog="Example: lorica init --data rows.jsonl --base ./llama")
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where run.yaml goes.")] = Path(),
    data: Annotated[str | None, typer.Option(help="Your rows: a file, a folder or a hub id.")] = None,
    base: Annotated[str, typer.Option(help="The base model: a folder or a hub id.")] = "embedded",
    json: Json = False,
) -> None:
    """Write a commented run.yaml that fits your data."""
    from lorica.recipes.init import init

    _finish(json, lambda: init(folder, data=data, base=base))


@data_app.command("check", epilog="Example: lorica data check rows.jsonl")
def data_check(target: Target, overrides: Overrides = None, json: Json = False) -> None:
    """Measure and judge the rows.

    Leaves with 3 if `train` would refuse them.
    """
    from lorica.recipes.data import check

    if _finish(json, lambda: check(target, overrides or [])).refusal is not None:
        raise typer.Exit(3)


@data_app.command("preview", epilog="Example: lorica data preview run.yaml --rows 2")
def data_preview(
    target: Target,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many samples.")] = 3,
    row: Annotated[int, typer.Option(min=0, help="The first sample, counted from 0.")] = 0,
    json: Json = False,
) -> None:
    """Show samples and which tokens are learned."""
    from lorica.recipes.data import preview

    _finish(json, lambda: preview(target, overrides or [], rows=rows, first=row))


@app.command(epilog="Example: lorica components rows.jsonl --output components")
def components(
    target: Target,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of JSON and map.")] = Path("components"),
    features: Annotated[Literal["tfidf", "hidden"], typer.Option(help="Of the texts, or of the base.")] = "tfidf",
    method: Annotated[Literal["kmeans", "dbscan"], typer.Option(help="How rows are grouped.")] = "kmeans",
    num: Annotated[int | None, typer.Option(min=1, help="How many, if known.", show_default="found")] = None,
    max_components: Annotated[int, typer.Option(min=1, help="The most that are looked for.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sample and clusters.")] = 0,
    json: Json = False,
) -> None:
    """Find which kinds of rows the data consists of."""
    from lorica.recipes.components import components

    _finish(
        json,
        lambda: components(
            target,
            overrides or [],
            output=output,
            features=features,
            method=method,
            num=num,
            max_components=max_components,
            limit=limit,
            seed=seed,
        ),
    )


@app.command(epilog="Example: lorica plan run.yaml --memory 8GiB")
def plan(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="run.yaml, or a run folder.")] = None,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, as in 8GiB.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run one step and compare.")] = False,
    qlora_table: Annotated[
        bool, typer.Option("--qlora-table", help="Instead: QLoRA's 7 to 65B, beside the paper's figures.")
    ] = False,
    json: Json = False,
) -> None:
    """Predict memory and speed without loading the weights."""
    if qlora_table:
        if config is not None or memory is not None or measure:
            raise typer.BadParameter("--qlora-table takes no CONFIG and no other option but --json")
        from lorica.recipes.qlora_table import qlora_table as print_table

        _finish(json, print_table)
        return
    if config is None:
        raise typer.BadParameter("give a CONFIG: run.yaml, or a run folder")
    from lorica.recipes.console import parse_bytes

    memory_bytes = None if memory is None else parse_bytes(memory)
    run = _load(config, overrides).config
    from lorica.recipes.plan import plan

    _finish(json, lambda: plan(run, memory_bytes=memory_bytes, measure=measure))


@app.command(epilog="Example: lorica train run.yaml method.rank=8 train.lr=3e-4 --resume auto")
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="auto|PATH", help="Go on from a checkpoint.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="The same as train.max_steps=N.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    allow_data_change: Annotated[
        bool, typer.Option("--allow-data-change", help="Resume though the rows have changed.")
    ] = False,
    json: Json = False,
) -> None:
    """Train an adapter and prove it."""
    run = _load(config, overrides, *([] if max_steps is None else [f"train.max_steps={max_steps}"]))
    from lorica.recipes.train import train

    _finish(json, lambda: train(run, resume=resume, dry_run=dry_run, allow_data_change=allow_data_change))


@app.command(epilog="Example: lorica sweep run.yaml train.lr=1e-4,3e-4,1e-3 method.rank=8,16")
def sweep(
    config: Config,
    axes: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE,VALUE", help="Values to try; a key with one is for all.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the sweep.", show_default="train.output + -sweep")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Run only this many, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    no_halving: Annotated[bool, typer.Option("--no-halving", help="Train all of them to the end.")] = False,
    json: Json = False,
) -> None:
    """Try settings and name the best ones.

    The same command again goes on where it was.
    """
    from lorica.recipes.sweep import sweep

    _finish(json, lambda: sweep(config, axes, output=output, samples=samples, seed=seed, halving=not no_halving))


@app.command(epilog="Example: lorica compare runs/first runs/second")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture of the curves.")] = Path("compare.png"),
    samples: Annotated[int, typer.Option(min=0, help="Let them answer this many evaluation rows.")] = 0,
    json: Json = False,
) -> None:
    """Show how runs differ, in settings and in results."""
    from lorica.recipes.compare import compare

    _finish(json, lambda: compare(runs, output=output, samples=samples))


@app.command("eval", epilog="Example: lorica eval runs/first --data test.jsonl")
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN|CONFIG", help="A run folder, or run.yaml.", show_default=False)],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Other rows to evaluate on.")] = None,
    split: Annotated[Literal["eval", "train"], typer.Option(help="Which of the run's rows.")] = "eval",
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base model out.")] = False,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Most rows to answer; the loss is over all.")] = None,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Only loss and perplexity.")] = False,
    json: Json = False,
) -> None:
    """Measure base and adapter on the same rows."""
    from lorica.recipes.evaluate import evaluate

    _finish(
        json,
        lambda: evaluate(
            run,
            overrides or [],
            data=data,
            split=split,
            base=not no_base,
            max_samples=max_samples,
            generate=False if no_generate else None,
        ),
    )


@app.command(epilog="Example: lorica merge runs/first --output merged")
def merge(run: Run, output: Output, overrides: Overrides = None, json: Json = False) -> None:
    """Write base and adapter as one plain model folder."""
    from lorica.recipes.merge import merge

    _finish(json, lambda: merge(run, output, overrides or []))


@app.command(epilog="Example: lorica export runs/first --output adapter")
def export(
    run: Run,
    output: Output,
    overrides: Overrides = None,
    format: Annotated[Literal["peft"], typer.Option(help="What to write.")] = "peft",
    json: Json = False,
) -> None:
    """Write the adapter for other tools."""
    from lorica.recipes.export import export

    _finish(json, lambda: export(run, output, format, overrides or []))


Model = Annotated[str, typer.Argument(metavar="RUN|BASE", help="A run folder, or a base model.", show_default=False)]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="256, or what fits")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much of the probability.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="Leave the adapter out.")]
QuantHead = Annotated[
    Literal["int8", "nf4"] | None, typer.Option(help="Quantise the output head: faster, a little less exact.")
]


@app.command(epilog='Example: lorica generate runs/first --prompt "Who approves travel?"')
def generate(
    model: Model,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    input: Annotated[Path | None, typer.Option(help="Rows to answer; without it and --prompt: stdin.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    base_only: BaseOnly = False,
    quant_head: QuantHead = None,
    json: Json = False,
) -> None:
    """Answer prompts."""
    from lorica.recipes.generate import generate

    if prompt is not None and input is not None:
        raise typer.BadParameter("give --prompt or --input, not both")
    _finish(
        json,
        lambda: generate(
            model,
            overrides or [],
            prompt=prompt,
            input=input,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            base_only=base_only,
            quant_head=quant_head,
        ),
    )


@app.command(epilog="Example: lorica chat runs/first --temperature 0.7")
def chat(
    model: Model,
    overrides: Overrides = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    base_only: BaseOnly = False,
    quant_head: QuantHead = None,
    json: Json = False,
) -> None:
    """Talk to a model in the terminal."""
    from lorica.recipes.generate import chat

    _finish(
        json,
        lambda: chat(
            model,
            overrides or [],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            base_only=base_only,
            quant_head=quant_head,
        ),
    )


@app.command(epilog="Example: lorica quickstart --output runs/quickstart")
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and training.")] = 0,
    json: Json = False,
) -> None:
    """Go the whole road with an embedded base model."""
    from lorica.recipes.quickstart import quickstart

    _finish(json, lambda: quickstart(output, seed))


@config_app.command("show", epilog="Example: lorica config show run.yaml train.lr=3e-4")
def config_show(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Show every value, where it came from and what it means."""
    rows = _load(config, overrides).describe()

    def show() -> list[Any]:
        from lorica.recipes.console import table
        from lorica.strict_yaml import dump_value

        cells = [(row.key, dump_value(row.value), row.origin, row.description) for row in rows]
        table("", ("key", "value", "from", "meaning"), cells)
        return rows

    _finish(json, show)


AdapterPath = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="An adapter folder, or a run folder.", show_default=False)
]
NewRank = Annotated[int | None, typer.Option(min=1, help="Rank of the result, by truncated SVD.", show_default=False)]


@adapter_app.command("inspect", epilog="Example: lorica adapter inspect runs/first")
def adapter_inspect(
    adapter: AdapterPath,
    base: Annotated[str | None, typer.Option(help="Compare with this base's weights.")] = None,
    json: Json = False,
) -> None:
    """Show modules, shapes, ranks, scales and sizes."""
    from lorica.recipes.adapter import inspect

    _finish(json, lambda: inspect(adapter, base=base))


@adapter_app.command("verify", epilog="Example: lorica adapter verify runs/first")
def adapter_verify(
    adapter: AdapterPath,
    base: Annotated[str | None, typer.Option(help="The base, if not the one it names.")] = None,
    json: Json = False,
) -> None:
    """Prove that it fits its base and changes it.

    Leaves with 1 if a tensor has no place or no logit changes.
    """
    from lorica.recipes.adapter import verify

    _finish(json, lambda: verify(adapter, base=base))


@adapter_app.command("convert", epilog="Example: lorica adapter convert runs/first --rank 8 --output small")
def adapter_convert(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER|FILE", help="An adapter, or loralib's state.safetensors.", show_default=False),
    ],
    output: Output,
    rank: NewRank = None,
    base: Annotated[str | None, typer.Option(help="loralib: the base.")] = None,
    alpha: Annotated[float | None, typer.Option(help="loralib: lora_alpha.")] = None,
    enabled: Annotated[
        list[str] | None, typer.Option(metavar="NAME=0|1,...", help="loralib: enable_lora, as in c_attn=1,0,1.")
    ] = None,
    json: Json = False,
) -> None:
    """Write it with another rank, its scale in B."""
    flags: dict[str, list[bool]] = {}
    for item in enabled or []:
        name, _, bits = item.partition("=")
        if not name or not bits or not set(bits.split(",")) <= {"0", "1"}:
            raise typer.BadParameter(f"--enabled is {item!r}; write it like c_attn=1,0,1")
        flags[name] = [bit == "1" for bit in bits.split(",")]
    from lorica.recipes.adapter import convert

    _finish(json, lambda: convert(adapter, output, rank=rank, base=base, alpha=alpha, enabled=flags))


@adapter_app.command("static", epilog="Example: lorica adapter static runs/hydra --rows rows.jsonl --output lora")
def adapter_static(
    run: Run,
    output: Output,
    rows: Annotated[str, typer.Option(help="Data like the run's: half to weight the heads, half to measure.")],
    overrides: Overrides = None,
    stacked: Annotated[bool, typer.Option("--stacked", help="Keep the heads apart, in num_heads x the rank.")] = False,
    json: Json = False,
) -> None:
    """Write a HydraLoRA as plain LoRA, its heads weighted once for all."""
    from lorica.recipes.static import static_merge

    _finish(json, lambda: static_merge(run, output, rows, stacked=stacked, overrides=overrides or []))


@adapter_app.command("combine", epilog="Example: lorica adapter combine runs/a=0.7 runs/b=0.3 --how svd --output both")
def adapter_combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]", help="Two or more; weight 1 if none.", show_default=False)
    ],
    output: Output,
    how: Annotated[Literal["linear", "cat", "svd", "ties", "dare"], typer.Option(help="See docs/adapters.md.")] = "svd",
    rank: NewRank = None,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="ties, dare: share that is kept.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="dare: seed of what is dropped.")] = 0,
    json: Json = False,
) -> None:
    """Write several adapters of one base as one."""
    from lorica.recipes.adapter import combine_adapters

    _finish(json, lambda: combine_adapters(adapters, output, how, rank=rank, density=density, seed=seed))


@adapter_app.command(
    "scale",
    epilog="Example: lorica adapter scale runs/first 0.5 --output half",
    context_settings={"ignore_unknown_options": True},  # -0.5 is a number
)
def adapter_scale(
    adapter: AdapterPath,
    factor: Annotated[
        float, typer.Argument(metavar="FACTOR", help="What the update is multiplied by.", show_default=False)
    ],
    output: Output,
    json: Json = False,
) -> None:
    """Write it with its update multiplied."""
    from lorica.recipes.adapter import scale

    _finish(json, lambda: scale(adapter, factor, output))


app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(adapter_app, name="adapter")
