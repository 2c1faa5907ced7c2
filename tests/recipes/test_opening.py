"""What a name on the command line stands for, where its base has moved, and weights that were cut off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorica
from lorica.cli import main
from lorica.config import RunConfig
from lorica.errors import AdapterError, ConfigError, ModelError
from lorica.interop.folder import WEIGHTS
from lorica.recipes.opening import Source, find_source, open_model


@pytest.fixture
def moved(make_config: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with run/, a copy of its adapter/, and the base that both name by its old place as new/."""
    shutil.copytree(tiny_base, tmp_path / "old")
    lorica.train(make_config(tmp_path / "run", base=tmp_path / "old", max_steps=1))
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter")
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path


@pytest.mark.parametrize("name", ["run", "adapter"])
def test_a_base_that_has_moved_can_be_named_anew(moved: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"old: there is no such folder.*say where it is now: model\.base=FOLDER\."):
        find_source(moved / name)
    model, _, _ = open_model(moved / name, [f"model.base={moved / 'new'}", "model.dtype=float32"])
    assert len(lorica.adapters(model)) == 14


def test_every_verb_says_how_to_name_the_base(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = str(moved / "run"), ["--output", str(moved / "out")]
    for words in (
        ["train", run, "--resume", "auto"],
        ["eval", run],
        ["generate", run, "--prompt", "Why?"],
        ["chat", run],
        ["merge", run, *output],
        ["export", run, *output],
        ["plan", run],
        ["data", "check", run],
        ["data", "preview", run],
    ):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "model.base=FOLDER" in said and "asking the hub" not in said
        if words[0] in ("merge", "export"):
            assert main([*words, f"model.base={moved / 'new'}"]) == 0
            shutil.rmtree(moved / "out")


def test_without_a_run_only_the_model_can_be_changed(moved: Path) -> None:
    assert find_source("embedded", ["model.dtype=bfloat16"]).model.dtype == "bfloat16"
    with pytest.raises(
        ConfigError, match=r"embedded is no run folder: only model\.KEY=VALUE .*, not data\.template=plain"
    ):
        find_source("embedded", ["model.dtype=bfloat16", "data.template=plain"])
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        find_source("embedded", ["model.dtyp=bfloat16"])


def test_a_misspelt_run_is_not_asked_for_at_the_hub(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(moved.parent)
    with pytest.raises(ConfigError, match=rf"no such run in {moved.name}\. Did you mean {moved.name}/run\?"):
        find_source(f"{moved.name}/runs")
    with pytest.raises(ConfigError, match=r"There are run\."):
        find_source(f"{moved.name}/quite-another")
    # Where there are no runs it may be a hub id.
    assert find_source("org/model").model.base == "org/model"
    assert capsys.readouterr().err == "org/model is no folder here; asking the hub for it.\n"


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_cut_off_weights_are_named_before_the_base_is_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(Source, "load_base", refuse)
    folder = tmp_path / "copy"
    shutil.copytree(finished if kind == "run" else finished / "adapter", folder)
    file = folder / "adapter" / WEIGHTS if kind == "run" else folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    advice = "`lorica train .*copy --resume auto` writes it again" if kind == "run" else "Copy the folder again"
    with pytest.raises(AdapterError, match=rf"{file} is damaged or cut off \(.*\)\. {advice}"):
        open_model(folder)
