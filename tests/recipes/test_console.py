"""Units, JSON and tables as people and programs read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorica.errors import ConfigError
from lorica.recipes import console


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 * 2**30), ("8 gb", 8 * 2**30), ("512M", 2**29), ("1.5k", 1536), ("1000", 1000), ("2TiB", 2**41)],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert console.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "8GiBs", "1e9", "nan"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="8GiB"):
        console.parse_bytes(text)


def test_units() -> None:
    assert [console.human_bytes(n) for n in (0, 1023, 1536, 2**20 - 1, 2**30, 200 * 2**20)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "1.0 GiB",
        "200 MiB",
    ]
    assert [console.human_seconds(s) for s in (0.012, 0.9999, 2, 59.97, 75, 7260)] == [
        "12 ms",
        "1.0 s",
        "2.0 s",
        "1 min 00 s",
        "1 min 15 s",
        "2 h 01 min",
    ]
    assert [console.human_count(n) for n in (9999, 12_345, 1_234_567, 8e9)] == ["9,999", "12.3 k", "1.23 M", "8.00 G"]


def test_json_holds_results(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Result:
        path: Path
        values: tuple[float, ...]

    console.print_json({"result": Result(Path("a"), (1.0, float("inf"))), "none": None})
    assert json.loads(capsys.readouterr().out) == {"result": {"path": "a", "values": [1.0, None]}, "none": None}
    with pytest.raises(TypeError, match="a result holds a object"):
        console.jsonable(object())


def test_tables_are_plain_and_whole_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(
        "Title", ("name", "count"), [("[red]x[/red] :smile:", 1), ("\x1b[31m" + "y" * 150, None)], numeric=("count",)
    )
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]x[/red] :smile:" in out and "y" * 150 in out
    assert out.splitlines()[0].strip() == "Title" and any(line.rstrip().endswith(" -") for line in out.splitlines())
