"""`lorica export`: the adapter as a folder for other programs, read back before it gets its name.

`peft`: what `peft.PeftModel.from_pretrained` loads. The run's own adapter/ folder has this format already; the export
adds the tokenizer with the chat template that was trained on, so that the folder is all that the other side needs
beside the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import ConfigError
from lorica.files import whole_folder
from lorica.interop.folder import read_proof
from lorica.interop.peft import load_adapter, save_adapter
from lorica.methods.attach import adapters, detach
from lorica.recipes import console
from lorica.recipes.merge import check_free, probe_ids
from lorica.recipes.opening import open_model
from lorica.recipes.proof import check_read_back, logits_of

FORMATS = ("peft",)


@dataclass(frozen=True)
class ExportResult:
    """An exported folder. max_difference: largest difference of a logit after reading it back; 0 on a CPU."""

    output: str
    format: str
    files: list[str]
    max_difference: float


def export(run: str | Path, output: str | Path, format: str = "peft", overrides: Sequence[str] = ()) -> ExportResult:
    """Write the adapter of `run` (a run folder or an adapter folder) to a new folder `output` in `format`.

    Args:
        overrides: `section.key=value`, on top of the run's config.yaml; of the section `model` where there is none.

    Raises:
        ConfigError: an unknown format, no adapter, or `output` exists and is not empty, or cannot be created.
        AdapterError: read back, the folder gives other logits.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; expected {' or '.join(FORMATS)}.")
    output = Path(output)
    check_free(output)
    model, tokenizer, renderer = open_model(run, overrides)
    if not adapters(model):
        raise ConfigError(f"{run} has no adapter to export. Give a run folder or an adapter folder.")
    ids = probe_ids(model)
    before = logits_of(model, ids)
    tokenizer.chat_template = renderer.template
    with whole_folder(output) as folder:
        save_adapter(model, folder)
        load_adapter(detach(model), folder)
        difference = check_read_back(before, logits_of(model, ids), model.device, "Not exported")
        tokenizer.save_pretrained(folder)
    console.log(f"Exported to {output}; read back, its logits are equal.")
    if quant := read_proof(output).base_quant:
        console.log(f"It began as what quantising took away, so it is right over the base in {quant} alone.")
    return ExportResult(str(output), format, sorted(p.name for p in output.iterdir()), difference)
