"""Imports point down: no file of a layer imports a higher one, and methods, models and data never import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lorica"

# Lowest first. Those of one layer may not import each other, but for the ones below.
LAYERS: list[set[str]] = [
    {"errors"},
    {"files", "assets"},
    {"kernels"},
    {"quant"},
    {"methods", "models", "data"},
    {"interop", "evaluate"},
    {"training"},
    {"config", "config_faults", "strict_yaml"},
    {"recipes"},
    {"cli"},
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NEIGHBOURS = [{"files", "assets"}, {"config", "config_faults", "strict_yaml"}]
# They import lazily what they name: the public names, and the command line.
OUTSIDE = {"__init__", "__main__"}


def part(file: Path) -> str:
    """The layer's name of a file of the package: its folder, or its own name."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, part of the package) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            if module == "lorica":
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif module.startswith("lorica."):
                yield node.lineno, module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lorica."):
                    yield node.lineno, alias.name.split(".")[1]


def arrows(files: dict[str, str]) -> list[str]:
    """Every import of `files`, {path in the package: source}, that points up or to a neighbour."""
    wrong = []
    for path, source in files.items():
        ours = part(PACKAGE / path)
        for line, theirs in imported(ast.parse(source)):
            if theirs not in RANKS or theirs == ours or any({ours, theirs} <= friends for friends in NEIGHBOURS):
                continue
            if RANKS[theirs] >= RANKS[ours]:
                wrong.append(f"lorica/{path}:{line} imports lorica.{theirs}")
    return wrong


def package() -> dict[str, str]:
    files = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    return {path: source for path, source in files.items() if part(PACKAGE / path) not in OUTSIDE}


def test_every_file_has_a_layer() -> None:
    assert {part(PACKAGE / path) for path in package()} <= RANKS.keys()
    assert len(package()) > 40


def test_no_import_points_up_or_aside() -> None:
    assert arrows(package()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/load.py", "from lorica.methods.lora import LoRA"),
        ("data/render.py", "def f():\n    from lorica.models import load"),
        ("methods/lora.py", "import lorica.training.loop"),
        ("training/loop.py", "from lorica.config import RunConfig"),
        ("evaluate/likelihood.py", "from lorica.interop import peft"),
        ("config.py", "from lorica import recipes"),
        ("recipes/train.py", "if TYPE_CHECKING:\n    from lorica.cli import main"),
        ("errors.py", "from lorica.files import flush"),
    ],
)
def test_what_points_up_or_aside_is_found(path: str, source: str) -> None:
    assert len(arrows({path: source})) == 1


def test_what_points_down_is_fine() -> None:
    assert (
        arrows({"training/loop.py": "from lorica.data.packing import pack\nfrom lorica.errors import LoricaError"})
        == []
    )
    assert arrows({"config.py": "from lorica.strict_yaml import parse", "recipes/merge.py": "import torch"}) == []


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.unsafe_load",
}


def unsafe(path: str, source: str) -> list[str]:
    """Uses of pickle, foreign code or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{path}:{node.lineno} {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name in FORBIDDEN_CALLS or options.get("shell", "False") != "False":
                found.append(f"{path}:{node.lineno} {name}")
            if options.get("trust_remote_code", "False") != "False" or options.get("allow_pickle", "False") != "False":
                found.append(f"{path}:{node.lineno} {name}")
    return found


def test_no_pickle_no_foreign_code_no_shell() -> None:
    """Reliability case 15."""
    files = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    assert [fault for path, source in files.items() for fault in unsafe(path, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "eval('1')",
        "subprocess.run(words, shell=True)",
        "os.system('ls')",
        "load(trust_remote_code=True)",
    ],
)
def test_what_is_unsafe_is_found(source: str) -> None:
    assert len(unsafe("files.py", source)) == 1
    assert unsafe("files.py", "model.eval()\nload(trust_remote_code=False)") == []
