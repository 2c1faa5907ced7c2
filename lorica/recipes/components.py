"""`lorica components`: which kinds of rows the data consists of, with a table, a map and a JSON file.

What counts is the whole row but a system prompt: a component is a kind of task, and a task shows in its question as in
its answer. The rows are read a few times instead of being held, so a file may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from lorica.config import RunConfig
from lorica.data.clustering import Criterion
from lorica.data.components import Components, Encode, find_components
from lorica.data.rows import Example, RowFault, refuse
from lorica.data.sources import stream_examples
from lorica.errors import DataError
from lorica.files import write_text
from lorica.recipes import console
from lorica.recipes.data import configuration

MAX_MESSAGE_CHARS = 2_000
MAX_TOKENS = 256
_BATCH_TEXTS = 16
_SHOWN_CHARS = 160


@dataclass(frozen=True, slots=True)
class Component:
    """One kind of rows. share: of all rows. samples: the beginnings of its most typical rows, with their places."""

    size: int
    share: float
    terms: tuple[str, ...]
    samples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ComponentsReport:
    """What was found: see `Components`. num_noise: rows that DBSCAN gives to none. files: what was written."""

    num: int
    num_rows: int
    num_noise: int
    num_left_out: int
    components: tuple[Component, ...]
    choices: dict[str, int]
    criteria: tuple[Criterion, ...]
    files: tuple[Path, ...]


def components(
    target: str,
    overrides: Sequence[str] = (),
    *,
    output: Path | str = Path("components"),
    features: Literal["tfidf", "hidden"] = "tfidf",
    method: Literal["kmeans", "dbscan"] = "kmeans",
    num: int | None = None,
    max_components: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> ComponentsReport:
    """Find the components of the rows of a file, a folder or a run.yaml, print them, and write them into `output`.

    features: "hidden" takes the mean of the base's last hidden states (model.base=FOLDER). The other arguments are
    those of `lorica.find_components`. DataError if a row cannot be used and data.on_bad_row is not drop.
    """
    config = configuration(target, overrides)
    data = config.data
    examples = stream_examples(data.train, format=data.format, columns=data.columns, split=data.split, limit=limit)
    num_rows, faults = 0, []
    for example in examples():
        num_rows += 1
        if isinstance(example, RowFault):
            faults.append(example)
    refuse(faults, num_rows, data.on_bad_row)
    if len(faults) == num_rows:
        raise DataError(f"{data.train}: none of its {num_rows} rows can be used.")

    def good() -> Iterator[Example]:
        return (example for example in examples() if isinstance(example, Example))

    found = find_components(
        lambda: map(text_of, good()),
        features=hidden_states(config) if features == "hidden" else "tfidf",
        method=method,
        num=num,
        max_components=max_components,
        seed=seed,
    )
    wanted = {row for rows in found.typical for row in rows}
    shown = {row: example for row, example in enumerate(islice(good(), max(wanted, default=0) + 1)) if row in wanted}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "components.json", folder / "components.png")
    write_text(files[0], found.to_json() + "\n")
    from lorica.recipes.pictures import draw_components

    draw_components(found, files[1])
    parts = zip(found.sizes, found.terms, found.typical, strict=True)
    report = ComponentsReport(
        found.num,
        len(found.labels),
        int((found.labels < 0).sum()),
        len(faults),
        tuple(
            Component(size, size / len(found.labels), terms, tuple(_sample(shown[row]) for row in rows))
            for size, terms, rows in parts
        ),
        found.choices,
        found.criteria,
        files,
    )
    _print(data.train, found, report)
    return report


def text_of(example: Example) -> str:
    """The text that a row is judged by: its plain text, or the contents of its turns.

    A system prompt is left out: most corpora have one for all rows, and next to it their kinds would look alike.
    """
    turns = [message.content for message in example.messages if message.role != "system"]
    parts = turns or [message.content for message in example.messages] or [example.text or "", example.text_pair or ""]
    return "\n".join(part[:MAX_MESSAGE_CHARS] for part in parts)


def hidden_states(config: RunConfig) -> Encode:
    """From texts to the mean of the base's last hidden states over their first `MAX_TOKENS` tokens, [texts, hidden]."""
    import torch

    from lorica.models.load import load_model, load_tokenizer

    model = load_model(config.model.base, revision=config.model.revision).eval()
    tokenizer = load_tokenizer(config.model.base, revision=config.model.revision)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return ids or [tokenizer.eos_token_id or 0]

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        rows = [torch.tensor(ids_of(text), device=model.device) for text in texts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        means = np.empty((len(rows), model.config.get_text_config().hidden_size), np.float32)
        for start in range(0, len(rows), _BATCH_TEXTS):
            batch = order[start : start + _BATCH_TEXTS]
            ids = torch.nn.utils.rnn.pad_sequence([rows[row] for row in batch], batch_first=True)
            lengths = torch.tensor([len(rows[row]) for row in batch], device=ids.device)
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            states = model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            means[batch] = ((states * mask[:, :, None]).sum(1) / lengths[:, None]).cpu().numpy()
        return means

    return encode


def _sample(example: Example) -> tuple[str, str]:
    text = " ".join(text_of(example).split())
    return example.origin, text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"


def _print(source: str, found: Components, report: ComponentsReport) -> None:
    rows = [
        (number, f"{part.size:,}", f"{part.share:.1%}", ", ".join(part.terms))
        for number, part in enumerate(report.components)
    ]
    if report.num_noise:
        rows.append((-1, f"{report.num_noise:,}", f"{report.num_noise / report.num_rows:.1%}", "(in no component)"))
    title = f"{source}: {report.num} {'component' if report.num == 1 else 'components'} in {report.num_rows:,} rows"
    console.table(title, ("component", "rows", "share", "words that tell it"), rows, numeric=("rows", "share"))
    samples = [(number, *sample) for number, part in enumerate(report.components) for sample in part.samples]
    console.table("Typical rows", ("component", "row", "begins"), samples)
    table = [
        (
            criterion.num,
            f"{criterion.inertia:.4f}",
            None if criterion.silhouette is None else f"{criterion.silhouette:.3f}",
            f"{criterion.log_likelihood:.2f} ± {criterion.standard_error:.2f}",
        )
        for criterion in report.criteria
    ]
    console.table("By number", ("number", "inertia", "silhouette", "held-out log likelihood"), table)
    out = console.stdout()
    chosen = ", ".join(f"{name.replace('_', '-')} {number}" for name, number in report.choices.items())
    decides = "--num" if found.settings["num"] else "overlap" if found.settings["method"] == "kmeans" else "dbscan"
    out.print(f"Each would choose: {chosen}. What decides: {decides}.")
    if report.num_left_out:
        out.print(f"{report.num_left_out:,} rows that cannot be used were left out.")
    out.print(f"Written: {', '.join(map(str, report.files))}")
