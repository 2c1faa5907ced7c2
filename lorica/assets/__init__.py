"""What ships inside the package: the embedded base model and the quickstart's data (`handbook`).

The base is a causal language model of 8 million parameters in the Llama architecture, trained for this project on
English text in the public domain or under CC BY, CC BY-SA and Apache-2.0; the weights are the project's own.
`base/README.md` is its model card: shape, training, sources, and what it can and cannot do.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_base() -> Path:
    """The folder of the embedded base model, in Hugging Face format."""
    return Path(str(files(__name__) / "base"))
