"""Lorica adapts a large model to your data with low-rank adapters, on the machine you have.

    import lorica

    model = lorica.load_model("folder-or-hub-id")
    model = lorica.adapt(model, lorica.LoRA(rank=16, targets="all-linear"))
    ...                                        # train it: your own loop, or lorica.train(config)
    lorica.save_adapter(model, "adapter/")     # a PEFT folder
    plain = lorica.merge(model)                # plain modules, no wrapper left

Names are imported when they are first used: `import lorica` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorica.config import RunConfig
    from lorica.data.components import Components, find_components
    from lorica.errors import LoricaError
    from lorica.interop.peft import load_adapter, save_adapter
    from lorica.methods.adalora import AdaLoRA
    from lorica.methods.attach import adapt, adapters, detach, in_front, merge, trainable_parameters
    from lorica.methods.bottleneck import Bottleneck
    from lorica.methods.dora import DoRA
    from lorica.methods.full import FullFineTuning
    from lorica.methods.hydra import HydraLoRA
    from lorica.methods.ia3 import IA3
    from lorica.methods.lora import LoRA
    from lorica.methods.prefix import PrefixTuning
    from lorica.methods.prompt import PromptTuning
    from lorica.methods.ptuning import PTuning
    from lorica.methods.ptuning_v2 import PTuningV2
    from lorica.methods.vera import VeRA
    from lorica.models.load import load_model, load_tokenizer
    from lorica.quant.loading import quantize
    from lorica.recipes.components import components
    from lorica.recipes.train import train

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - sorted as dir() sorts
    "AdaLoRA",
    "Bottleneck",
    "Components",
    "DoRA",
    "FullFineTuning",
    "HydraLoRA",
    "IA3",
    "LoRA",
    "LoricaError",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "RunConfig",
    "VeRA",
    "__version__",
    "adapt",
    "adapters",
    "components",
    "detach",
    "find_components",
    "in_front",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "quantize",
    "save_adapter",
    "train",
    "trainable_parameters",
]

_HOMES = {
    "AdaLoRA": "lorica.methods.adalora",
    "Bottleneck": "lorica.methods.bottleneck",
    "Components": "lorica.data.components",
    "DoRA": "lorica.methods.dora",
    "FullFineTuning": "lorica.methods.full",
    "HydraLoRA": "lorica.methods.hydra",
    "IA3": "lorica.methods.ia3",
    "LoRA": "lorica.methods.lora",
    "LoricaError": "lorica.errors",
    "PTuning": "lorica.methods.ptuning",
    "PTuningV2": "lorica.methods.ptuning_v2",
    "PrefixTuning": "lorica.methods.prefix",
    "PromptTuning": "lorica.methods.prompt",
    "RunConfig": "lorica.config",
    "VeRA": "lorica.methods.vera",
    "adapt": "lorica.methods.attach",
    "adapters": "lorica.methods.attach",
    "components": "lorica.recipes.components",
    "detach": "lorica.methods.attach",
    "find_components": "lorica.data.components",
    "in_front": "lorica.methods.attach",
    "load_adapter": "lorica.interop.peft",
    "load_model": "lorica.models.load",
    "load_tokenizer": "lorica.models.load",
    "merge": "lorica.methods.attach",
    "quantize": "lorica.quant.loading",
    "save_adapter": "lorica.interop.peft",
    "train": "lorica.recipes.train",
    "trainable_parameters": "lorica.methods.attach",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":  # the one public module: lorica.kernels.nf4_quantize
        return importlib.import_module("lorica.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
