"""Files that ship with the package: the embedded base model and the quickstart's data."""

from __future__ import annotations

from pathlib import Path


def embedded_base() -> Path:
    """The folder of the embedded base model, in Hugging Face format."""
    return Path(__file__).parent / "base"
