"""Small seeded bases of other shapes than a causal language model, with tokenizers made for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

TEXT = """the film was a very good bad dull fine poor great story cast and not it is i like hate loved of what plus
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen same other"""
WORDS = TEXT.split()
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
_FAIRSEQ = {
    "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>",
}  # fmt: skip
SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": _FAIRSEQ,
    "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "bart": _FAIRSEQ,
    "llama": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
}
AROUND = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "bart": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
    "llama": ("<s> $A", "<s> $A $B"),
}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Whole words, in the vocabulary behind the special tokens of `kind`."""
    special = list(dict.fromkeys(SPECIAL[kind].values()))
    ids = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[kind]["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = AROUND[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(word, ids[word]) for word in special]
    )
    names = {f"{name}_token": word for name, word in SPECIAL[kind].items()}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def make_base(kind: str, folder: Path) -> Path:
    """A random base of the shape `kind` in `folder`: no head for classes, for BERT no pooling layer either."""
    tokenizer = make_tokenizer(kind)
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = {name: value for name, value in ids.items() if value is not None} | {"vocab_size": len(tokenizer)}
    pair = {"d_model": 32, "decoder_start_token_id": ids.get("pad_token_id")}
    makers: dict[str, Any] = {
        "bert": lambda: AutoModel.from_config(BertConfig(**SMALL, **ids), dtype=torch.float32),
        "roberta": lambda: AutoModel.from_config(RobertaConfig(**SMALL, **ids), dtype=torch.float32),
        "llama": lambda: AutoModelForCausalLM.from_config(
            LlamaConfig(**SMALL, **ids, num_key_value_heads=2), dtype=torch.float32
        ),
        "t5": lambda: AutoModelForSeq2SeqLM.from_config(
            T5Config(**ids, **pair, d_kv=8, d_ff=48, num_layers=2, num_heads=4), dtype=torch.float32
        ),
        "bart": lambda: AutoModelForSeq2SeqLM.from_config(
            BartConfig(
                **ids, **pair, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                init_std=0.2, decoder_attention_heads=4,
                encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40,
            ), dtype=torch.float32
        ),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = makers[kind]()
        if kind == "bert":
            model.pooler = None
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
