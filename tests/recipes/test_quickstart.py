"""`lorica quickstart`: the whole road on a base so small that it takes seconds; what is learned is another matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.config import RunConfig
from lorica.recipes import quickstart as recipe


def test_the_report_holds_what_each_step_found(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(output: Path, train_rows: Path, eval_rows: Path, seed: int) -> RunConfig:
        data: dict[str, Any] = {"train": str(train_rows), "eval": str(eval_rows), "max_length": 256}
        config = make_config(output / "run", data=data, max_steps=2, batch_tokens=1024, seed=seed)
        answers = config.eval.model_copy(update={"max_new_tokens": 2, "batch_size": 64, "max_samples": 60})
        return config.model_copy(update={"eval": answers})

    monkeypatch.setattr(recipe, "_config", small)
    result = recipe.quickstart(tmp_path / "quick")
    assert set(result.before) == set(result.after) == {"facts", "records", "sums"}
    report = (tmp_path / "quick" / "report.md").read_text(encoding="utf-8")
    merged = result.merge.agreement
    for line in (
        f"| merged folder read back: largest difference of a logit | {merged.max_difference:.3g} |",
        f"| share of the adapter's effect that merging keeps | {merged.kept:.2%} |",
        "| status | finished after 2 steps |",
    ):
        assert line in report
    written = json.loads((tmp_path / "quick" / "quickstart.json").read_text(encoding="utf-8"))
    assert written["merge"]["agreement"]["kl"] == merged.kl and written["training"]["steps"] == 2
    assert {path.name for path in (tmp_path / "quick").iterdir()} >= {"handbook", "run.yaml", "run", "merged", "peft"}
