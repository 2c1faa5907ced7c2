"""`lorica adapter static`: a HydraLoRA adapter as a stock LoRA, its heads weighted as suits the tokens of rows best.

Half of the rows gives the weights, the other half, every second row, says what that costs: the divergence of the logits
from the routed model's, beside the divergences of plain mean gates and of the base. The folder is read back before it
gets its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorica.errors import AdapterError, ConfigError
from lorica.files import whole_folder
from lorica.interop.peft import load_adapter, save_adapter
from lorica.methods.attach import adapters, detach, with_merged
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.hydra_static import calibrated, to_lora
from lorica.methods.lora_kinds import LoraLinear
from lorica.recipes import console
from lorica.recipes.merge import check_free, probe_ids
from lorica.recipes.opening import find_source
from lorica.recipes.preparing import load_rows
from lorica.recipes.proof import Agreement, agreement, check_read_back, logits_of

MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class StaticMerge:
    """A written LoRA folder.

    gates: the mean gates of each module's heads. num_tokens: held-out ones, over which the rest is measured. kl: of the
    routed model's logits from the LoRA's, mean nats a token. kl_of_means: the same with gates held at their means,
    `gates`. kl_of_base: the same of the base's. top1: share of tokens with the same first choice.
    """

    output: str
    rank: int
    num_calibration_rows: int
    num_held_out_rows: int
    num_tokens: int
    kl: float
    kl_of_means: float
    kl_of_base: float
    top1: float
    gates: dict[str, list[float]]


def static_merge(
    run: str | Path, output: str | Path, rows: str, *, stacked: bool = False, overrides: Sequence[str] = ()
) -> StaticMerge:
    """Write the HydraLoRA of `run` (a run folder or an adapter folder) as plain LoRA to a new folder `output`.

    Args:
        rows: data like the run's, of which at most 256 rows, evenly spread, are read.
        stacked: the heads side by side, in rank N r; it computes the same.
        overrides: `section.key=value`, on top of the run's config.yaml; of the section `model` where there is none.

    Raises:
        ConfigError: `output` exists and is not empty, or there are fewer than two rows.
        AdapterError: the adapter is no HydraLoRA, or the folder, read back, gives other logits.
        DataError: the rows cannot be read.
    """
    output = Path(output)
    check_free(output)
    source = find_source(run, overrides)
    if source.adapter is None:
        raise ConfigError(f"{run} has no adapter. Give a run folder or an adapter folder.")
    _, renderer = source.open_tokenizer()
    dataset = load_rows(source.run, source.task(), renderer, rows, None).dataset
    if len(dataset) < 2:
        raise ConfigError(
            f"{rows} has {len(dataset)} rows; expected two at least: some for the means, some to measure."
        )
    count = min(len(dataset), MAX_ROWS)
    chosen = [torch.from_numpy(dataset[i * len(dataset) // count][0].astype("int64"))[None] for i in range(count)]
    calibration, held_out = chosen[::2], chosen[1::2]

    routed = load_adapter(source.load_base(), source.adapter).eval()
    if not any(isinstance(adapter, HydraLinear) for adapter in adapters(routed).values()):
        raise AdapterError(f"{source.adapter} is no HydraLoRA, whose gates --rows is for.")
    found = calibrated(routed, ({"input_ids": ids.to(routed.device), "use_cache": False} for ids in calibration))
    static = to_lora(routed, {name: constants.mixes for name, constants in found.items()}, stacked=stacked)
    of_means = to_lora(routed, {name: constants.gates for name, constants in found.items()})
    plain = with_merged(routed, [a.base if isinstance(a, HydraLinear) else a for a in adapters(routed).values()])
    kl, top1, num_tokens = _compared(routed, static, held_out)
    kl_of_means, _, _ = _compared(routed, of_means, held_out)
    kl_of_base, _, _ = _compared(routed, plain, held_out)
    _save(static, output)
    result = StaticMerge(
        output=str(output),
        rank=max(a.rank for a in adapters(static).values() if isinstance(a, LoraLinear)),
        num_calibration_rows=len(calibration),
        num_held_out_rows=len(held_out),
        num_tokens=num_tokens,
        kl=kl,
        kl_of_means=kl_of_means,
        kl_of_base=kl_of_base,
        top1=top1,
        gates={name: constants.gates.tolist() for name, constants in found.items()},
    )
    _say(result)
    return result


def _compared(ours: PreTrainedModel, theirs: PreTrainedModel, rows: Iterable[Tensor]) -> tuple[float, float, int]:
    """(KL in nats a token, share of equal first choices, tokens), over all rows together."""
    found: list[Agreement] = []
    for ids in rows:
        first, second = logits_of(ours, ids), logits_of(theirs, ids)
        found.append(agreement(first, second, second, ours.dtype))
    num_tokens = sum(part.num_tokens for part in found)
    kl, top1 = (sum(getattr(part, key) * part.num_tokens for part in found) / num_tokens for key in ("kl", "top1"))
    return kl, top1, num_tokens


def _save(static: PreTrainedModel, output: Path) -> None:
    ids = probe_ids(static)
    before = logits_of(static, ids)
    with whole_folder(output) as folder:
        save_adapter(static, folder)
        again = cast(PreTrainedModel, load_adapter(detach(static), folder))
        check_read_back(before, logits_of(again, ids), again.device, "Not converted")


def _say(result: StaticMerge) -> None:
    console.table(
        "",
        ("module", "mean gates"),
        [(name, " ".join(f"{gate:.3f}" for gate in gates)) for name, gates in result.gates.items()],
    )
    console.log(
        f"Written to {result.output} as LoRA of rank {result.rank}, and read back. On {result.num_held_out_rows} "
        f"held-out rows ({result.num_tokens:,} tokens) its logits are {result.kl:.3g} nats a token from the routed "
        f"model's, where mean gates are {result.kl_of_means:.3g} and the base {result.kl_of_base:.3g}; the first "
        f"choice is the same at {result.top1:.1%}. Its heads are weighted by {result.num_calibration_rows} other rows."
    )
