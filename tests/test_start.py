"""What is to start quickly must import little: a list of modules, for seconds mean nothing on a busy machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Of those that transformers imports with every model (sympy, and SciPy where it is installed), none can be left out.
HEAVY = {
    "bitsandbytes", "datasets", "IPython", "matplotlib", "pandas", "peft", "pyarrow", "rouge_score", "sacrebleu",
    "sklearn", "tensorboard", "torchaudio", "torchvision", "trl", "triton",
}  # fmt: skip
MODELS = {"numpy", "pydantic", "rich", "safetensors", "tokenizers", "torch", "transformers", "yaml"}


def imported(program: str) -> set[str]:
    """The packages that a process has imported at the end of `program`."""
    more = "\nimport json, sys\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    found = subprocess.run([sys.executable, "-c", program + more], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_help_and_import_are_light() -> None:
    assert not imported("import lorica") & (MODELS | HEAVY | {"typer"})
    # typer brings pydantic itself.
    help_page = "from lorica.cli import main\nassert main(['train', '--help']) == 0"
    assert not imported(help_page) & ((MODELS | HEAVY) - {"pydantic"})


def test_the_configuration_needs_no_model(tmp_path: Path) -> None:
    assert not imported("import lorica.config") & (HEAVY | {"torch", "transformers", "typer", "rich"})


def test_training_imports_what_it_uses() -> None:
    """Pictures, scores and clusters come when they are made."""
    assert not imported("import lorica.recipes.train") & HEAVY
