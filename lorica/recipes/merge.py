"""`lorica merge`: the adapter folded into its base, as a plain folder that transformers loads and that knows nothing
of us.

The proof comes before the name: the merged folder is written aside, loaded back, and its logits are compared with those
of the adapted model; only a folder that agrees gets its name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.errors import AdapterError, ConfigError
from lorica.files import whole_folder
from lorica.interop.folder import read_proof
from lorica.methods.attach import adapters, detach
from lorica.methods.attach import merge as merge_adapters
from lorica.methods.lora_kinds import LoraEmbedding
from lorica.methods.requantize import Drift, merge_requantized
from lorica.methods.tokens import TokenEmbedding
from lorica.models.load import load_model
from lorica.recipes import console
from lorica.recipes.opening import find_source, open_model
from lorica.recipes.proof import Agreement, agreement, check_read_back, logits_of

WORTH_A_WARNING = 0.9


@dataclass(frozen=True)
class MergeResult:
    """A merged folder, and how it agrees with the adapted model that it came from.

    drift: what quantising the merged weights again did, where that was asked for.
    """

    output: str
    agreement: Agreement
    drift: Drift | None = None


def merge(run: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> MergeResult:
    """Merge the adapter of `run` (a run folder or an adapter folder) into a new folder `output`.

    What was trained over quantised weights is merged into those that they were made of; what began as their error
    (init loftq), into what they are dequantised to. With an override such as `model.quant=nf4` it is merged into
    quantised ones, which loses much of it; how much is measured and said.

    Args:
        overrides: `section.key=value`, on top of the run's config.yaml; of the section `model` where there is none.

    Raises:
        ConfigError: `run` has no adapter, or `output` exists and is not empty, or cannot be created.
        NotMergeableError: the method's adapters are no fixed change of weights, or the base is there quantised alone.
        AdapterError: the merged folder, read back, does not agree with the adapted model within its dtype's rounding.
    """
    output = Path(output)
    check_free(output)
    source = find_source(run, overrides)
    is_asked = any(assignment.partition("=")[0].strip() == "model.quant" for assignment in overrides)
    if source.adapter is None or read_proof(source.adapter).base_quant is None:
        overrides = ["model.quant=null", *overrides]
    requantizes = is_asked and source.model.quant is not None
    model, tokenizer, renderer = open_model(run, overrides)
    if not adapters(model):
        raise ConfigError(f"{run} has no adapter to merge. Give a run folder or an adapter folder.")
    proof, drift = write_merged(model, tokenizer, renderer.template, output, requantizes)
    console.log(
        f"Merged into {output}. Read back, its logits differ from the adapted model's by at most "
        f"{proof.max_difference:.3g} (largest logit {proof.largest_logit:.3g}); KL {proof.kl:.2g} nats a token, "
        f"same first choice at {proof.top1:.1%} of {proof.num_tokens} positions."
    )
    if drift is not None:
        console.log(
            f"Warning: quantised again, the weights (|w| {drift.weight:.2g} on average) moved by {drift.error:.2g}; "
            f"the adapter moves them by {drift.change:.2g}. Without model.quant they are merged into the original."
        )
    elif proof.kept < WORTH_A_WARNING:
        console.log(
            f"Warning: rounded to the base's dtype, the merged weights keep {proof.kept:.0%} of what the adapter "
            "changes. Remove it and merge again with model.dtype=float32, or use the adapter unmerged."
        )
    return MergeResult(str(output), proof, drift)


def write_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None, output: Path, requantizes: bool
) -> tuple[Agreement, Drift | None]:
    """Write the merged model and its tokenizer to `output`, whole or not at all; see `merge` for the proof.

    `model` is the bare base afterwards.
    """
    ids = probe_ids(model)
    adapted = logits_of(model, ids)
    plain, drift = merge_requantized(model) if requantizes else (merge_adapters(model), None)
    merged, base = logits_of(plain, ids), logits_of(detach(model), ids)
    tokenizer.chat_template = template
    with whole_folder(output) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Not the adapted model's: transformers takes the first parameter's, which may be an adapter's float32.
        dtype = plain.dtype
        del plain
        again = load_model(folder, dtype=dtype, device=model.device)
        check_read_back(merged, logits_of(again, ids), model.device, "Not merged")
        proof = agreement(adapted, merged, base, dtype)
        if drift is None and not proof.holds:
            raise AdapterError(
                f"Not merged: a logit differs by {proof.max_difference:.3g} from the adapted model's (largest logit "
                f"{proof.largest_logit:.3g}; {proof.tolerance * proof.largest_logit:.3g} is allowed), and "
                f"{proof.kept:.0%} of what the adapter changes is kept. With model.dtype=float32 less is rounded away."
            )
    return proof, drift


def probe_ids(model: PreTrainedModel, rows: int = 4, length: int = 32) -> torch.Tensor:
    """Token ids [rows, length] to compare models on: pseudo-random ones, half of them those that the adapter on an
    embedding changed most. A random token is hardly ever one that was trained on.
    """
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, embedding.weight.shape[0], (rows * length,), generator=torch.Generator().manual_seed(0))
    if isinstance(embedding, LoraEmbedding):
        changed = embedding.lora_a.detach().abs().amax(0)
        most = changed.topk(min(rows * length // 2, len(changed))).indices
        ids[: len(most)] = most.cpu()
    elif isinstance(embedding, TokenEmbedding):
        trained = embedding.token_ids[: rows * length // 2]
        ids[: len(trained)] = trained.cpu()
    return ids.view(rows, length)


def check_free(output: Path) -> None:
    """Refuse, before anything is computed, an output folder that holds something already or that cannot be created."""
    around = output
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(f"{output} exists and is not empty. Choose another --output, or remove it first.")
        # Where it will be filled under another name, then renamed. Permissions alone do not tell a superuser.
        around = next(folder for folder in output.resolve().parents if folder.exists())
        tempfile.TemporaryDirectory(dir=around).cleanup()
    except OSError as error:
        raise ConfigError(f"{output} cannot be created: {around}: {error.strerror}. Choose another --output.") from None
