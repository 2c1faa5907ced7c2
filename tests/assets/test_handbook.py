"""The handbook: deterministic, nothing held out occurs in training, and sums that add up."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from lorica.assets.handbook import HandbookFiles, write_handbook

NAMES = ("train", "facts_eval", "records_eval", "sums_eval")
HELD_OUT = NAMES[1:]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> HandbookFiles:
    return write_handbook(tmp_path_factory.mktemp("handbook") / "made" / "here")


def of_task(files: HandbookFiles, task: str) -> list[dict[str, Any]]:
    return [row for row in rows(files.train) if row["task"] == task]


def test_same_seed_same_bytes(files: HandbookFiles, tmp_path: Path) -> None:
    again, other = write_handbook(tmp_path / "again"), write_handbook(tmp_path / "other", seed=1)
    for name in NAMES:
        assert getattr(again, name).read_bytes() == getattr(files, name).read_bytes()
        assert getattr(other, name).read_bytes() != getattr(files, name).read_bytes()


def test_sizes_and_columns(files: HandbookFiles) -> None:
    assert Counter(row["task"] for row in rows(files.train)) == {"facts": 720, "records": 160, "sums": 300}
    assert [len(rows(getattr(files, name))) for name in HELD_OUT] == [240, 40, 60]
    assert rows(files.evaluation) == [row for name in HELD_OUT for row in rows(getattr(files, name))]
    for name in NAMES:
        for row in rows(getattr(files, name)):
            assert {"prompt", "response", "task"} <= set(row) <= {"prompt", "response", "task", "references"}
            assert row["prompt"].strip() and row["response"].strip()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_held_out_is_trained(tmp_path: Path, seed: int) -> None:
    files = write_handbook(tmp_path, seed=seed)
    trained = [row["prompt"] for row in rows(files.train)]
    held_out = [row["prompt"] for name in HELD_OUT for row in rows(getattr(files, name))]
    assert len(set(held_out)) == len(held_out)
    assert not set(trained) & set(held_out)
    assert len(set(trained)) == len(trained)


def test_every_fact_has_one_answer_in_all_its_phrasings(files: HandbookFiles) -> None:
    trained, held_out = of_task(files, "facts"), rows(files.facts_eval)
    facts = Counter((thing_of(row["prompt"]), row["response"]) for row in trained)
    assert len(facts) == 120
    assert set(facts.values()) == {6}
    assert Counter((thing_of(row["prompt"]), row["response"]) for row in held_out) == dict.fromkeys(facts, 2)


def test_held_out_phrasings_occur_in_no_training_row(files: HandbookFiles) -> None:
    trained = {phrasing(row["prompt"]) for row in of_task(files, "facts")}
    asked = {phrasing(row["prompt"]) for row in rows(files.facts_eval)}
    assert len(trained) == 12 * 6 and len(asked) == 12 * 2
    assert not trained & asked


def test_a_fact_cannot_be_guessed_from_its_relation(files: HandbookFiles) -> None:
    answers: dict[str, list[str]] = defaultdict(list)
    for row in of_task(files, "facts"):
        answers[phrasing(row["prompt"])].append(row["response"])
    assert all(len(set(values)) == len(values) == 10 for values in answers.values())


def thing_of(prompt: str) -> str:
    from lorica.assets import handbook

    things = (*handbook.DEPARTMENTS, *handbook.PRODUCTS, *handbook.PROCEDURES, *handbook.MACHINES)
    (thing,) = [thing for thing in things if re.search(rf"\b{thing}\b", prompt)]
    return thing


def phrasing(prompt: str) -> str:
    return prompt.replace(thing_of(prompt), "{}")


def test_sentences_hold_every_value_of_their_record(files: HandbookFiles) -> None:
    for row in of_task(files, "records") + rows(files.records_eval):
        fields = dict(part.split(": ") for part in row["prompt"].split(" | "))
        assert list(fields) == ["part", "supplier", "lead time", "storage"]
        for sentence in row.get("references", [row["response"]]):
            assert all(value in sentence for value in fields.values())
    assert all(len(set(row["references"])) == 3 for row in rows(files.records_eval))


def test_records_held_out_are_new_in_part_and_in_combination(files: HandbookFiles) -> None:
    def split(row: dict[str, Any]) -> list[str]:
        return list(row["prompt"].split(" | ", 1))

    trained = [split(row) for row in of_task(files, "records")]
    held_out = [split(row) for row in rows(files.records_eval)]
    for column in (0, 1):
        assert not {row[column] for row in trained} & {row[column] for row in held_out}


def test_sums_are_right(files: HandbookFiles) -> None:
    for row in of_task(files, "sums") + rows(files.sums_eval):
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        if "part" in row["prompt"]:
            price, cents, delivery = numbers[:3]
            assert row["response"] == f"{price + delivery}.{cents:02d}"
            continue
        hours = int(re.search(r"(\d+) hours", row["prompt"])[1])  # type: ignore[index]
        hour, minute = map(int, re.search(r"(\d+):(\d\d)", row["prompt"])[0].split(":"))  # type: ignore[index]
        moved = hour - hours if "ended" in row["prompt"] else hour + hours
        assert 0 <= moved < 24
        assert row["response"] == f"{moved}:{minute:02d}"
