from __future__ import annotations

import json
from typing import Any

import pytest

from lorica.errors import CheckpointError
from lorica.training.identity import check_identity


def make_identity(**changes: Any) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "model": {"fingerprint": "f00d"},
        "method": {"name": "lora", "rank": 8, "targets": ("q_proj", "v_proj"), "rank_pattern": {"q_proj": 4}},
        "data": {"fingerprint": "abc", "loss_on": "response"},
        "order": {"seed": 0, "batch_tokens": 4096},
        "settings": {"lr": 1e-4, "eval_every": 50},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        identity[section] = {**identity[section], key: value}
    return identity


SAVED = json.loads(json.dumps(make_identity()))


def test_the_same_run_passes_through_json_without_a_word() -> None:
    assert check_identity(SAVED, make_identity()) == []


def test_all_differences_that_matter_are_listed_together() -> None:
    now = make_identity(method__rank=16, method__targets=("q_proj",), order__seed=1, settings__lr=1.0)
    with pytest.raises(CheckpointError) as caught:
        check_identity(SAVED, now)
    message = str(caught.value)
    for line in ("method.rank: 8 in the checkpoint, 16 now", "method.targets: ['q_proj', 'v_proj']", "order.seed: 0"):
        assert line in message
    assert "settings.lr" not in message and "--allow-data-change" not in message


def test_a_changed_nested_value_is_found() -> None:
    with pytest.raises(CheckpointError, match=r"method\.rank_pattern\.q_proj: 4 in the checkpoint, None now"):
        check_identity(SAVED, make_identity(method__rank_pattern={}))


def test_changed_settings_only_warn() -> None:
    assert check_identity(SAVED, make_identity(settings__lr=3e-4)) == [
        "settings.lr: 0.0001 in the checkpoint, 0.0003 now"
    ]


def test_changed_data_is_refused_unless_allowed() -> None:
    now = make_identity(data__fingerprint="xyz")
    with pytest.raises(CheckpointError, match="--allow-data-change"):
        check_identity(SAVED, now)
    assert len(check_identity(SAVED, now, allow_data_change=True)) == 1


def test_allowing_changed_data_allows_nothing_else() -> None:
    with pytest.raises(CheckpointError, match=r"order\.seed"):
        check_identity(SAVED, make_identity(data__fingerprint="xyz", order__seed=9), allow_data_change=True)
