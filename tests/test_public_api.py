"""The public names, that they cost nothing until used, and that the package's own example works."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorica


def test_the_names_are_sorted_and_resolve() -> None:
    assert lorica.__all__ == sorted(lorica.__all__) == dir(lorica)
    assert set(lorica.__all__) == {*lorica._HOMES, "__version__"}
    for name, home in lorica._HOMES.items():
        value = getattr(lorica, name)
        assert value is getattr(importlib.import_module(home), name)
        # Where it is defined, so that documentation and pickles of names agree.
        assert value.__module__ == home and inspect.getdoc(value)
    with pytest.raises(AttributeError, match="module 'lorica' has no attribute 'lora'"):
        _ = lorica.lora  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(lorica.__file__)).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lorica._HOMES


def test_importing_costs_nothing() -> None:
    """Neither the package nor what the command line needs before a verb runs loads anything heavy."""
    code = (
        "import sys, json, lorica, lorica.cli, lorica.config, lorica.errors; lorica.LoricaError; lorica.RunConfig;"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "matplotlib", "sklearn", "pyarrow", "peft"}
    assert heavy & set(json.loads(done.stdout)) == set()


def test_the_example_of_the_package_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines as they stand, on the embedded base; the gap is one step of a loop of one's own."""
    doc = inspect.getdoc(lorica)
    assert doc is not None
    lines = [line.strip() for line in doc.splitlines() if line.startswith("    ")]
    gap = next(index for index, line in enumerate(lines) if line.startswith("..."))
    before, after = "\n".join(lines[:gap]), "\n".join(lines[gap + 1 :])
    assert "folder-or-hub-id" in before and "save_adapter" in after and "merge" in after
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(before.replace("folder-or-hub-id", "embedded"), names)
    model = names["model"]
    ids = torch.arange(50, 60)[None]
    optimizer = torch.optim.SGD(lorica.trainable_parameters(model).values(), lr=1.0)  # type: ignore[arg-type]
    first = model(input_ids=ids, labels=ids).loss  # type: ignore[operator]
    first.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < first  # type: ignore[operator]
    exec(after, names)
    plain, again = names["plain"], lorica.load_adapter(lorica.load_model("embedded"), "adapter/")
    assert not lorica.adapters(plain) and len(lorica.adapters(again)) == 56  # type: ignore[arg-type]
    with torch.no_grad():
        ours, merged, read = (m(input_ids=ids).logits for m in (model, plain, again.eval()))  # type: ignore[operator]
    assert torch.equal(ours, read)
    torch.testing.assert_close(merged, ours, rtol=0.06, atol=0.06 * float(ours.abs().max()))
    assert torch.equal(lorica.detach(again)(input_ids=ids).logits, lorica.load_model("embedded")(input_ids=ids).logits)
