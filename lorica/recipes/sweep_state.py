"""sweep.json: how far each arm of a sweep is, so that the same command goes on where it was.

Only the rung that an arm has reached is written, and what made it fail; its losses stand in its own metrics.jsonl, and
what it is in its own config.yaml. Halving is decided anew from these each time: arms can be added to a sweep, and one
whose folder is deleted begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica.config import Resolved, load_config
from lorica.errors import ConfigError
from lorica.files import read_json_object, write_json
from lorica.recipes.arms import Arm
from lorica.strict_yaml import dump_value

STATE = "sweep.json"


class SweepState:
    """What is known of the arms by their names. The caller holds the folder's lock."""

    def __init__(self, folder: Path, arms: Sequence[Arm], evaluation_rows: str) -> None:
        """Begin a sweep in `folder`, or go on with the one that is there.

        Args:
            evaluation_rows: a fingerprint; losses on other rows could not be compared.

        Raises:
            ConfigError: there is another sweep, with every difference, or its sweep.json or an arm is damaged.
        """
        self._file = folder / STATE
        self._content: dict[str, Any] = {"evaluation_rows": evaluation_rows, "arms": {}}
        if self._file.exists():
            self._content = _read(self._file)
            saved = self._content["arms"]
            self._content["arms"] = {name: arm for name, arm in saved.items() if (folder / name).is_dir()}
            damaged = [name for name, arm in self._content["arms"].items() if not _has_log(folder / name, arm)]
            if damaged:
                raise ConfigError(
                    "\n".join(f"{folder / name} has lost its metrics.jsonl." for name in damaged)
                    + "\nAn arm whose folder is deleted begins anew."
                )
            faults = _differences(self._content, arms, evaluation_rows)
            if faults:
                raise ConfigError(
                    f"{folder} holds another sweep:\n  " + "\n  ".join(faults) + "\n"
                    "Give the settings of then (more values are fine), or another --output."
                )
        write_json(self._file, self._content)

    def step(self, name: str) -> int:
        """The rung that the arm has reached, or failed on its way to, in steps; 0 before the first."""
        return int(self._arm(name).get("step", 0))

    def failure(self, name: str) -> tuple[str, str] | None:
        """Status and reason of an arm that failed."""
        found = self._arm(name).get("failure")
        return None if found is None else (found[0], found[1])

    def record(self, name: str, *, step: int, failure: tuple[str, str] | None) -> None:
        """Note it on the disk."""
        self._content["arms"][name] = {"step": step, "failure": failure}
        write_json(self._file, self._content)

    def _arm(self, name: str) -> Mapping[str, Any]:
        arm: Mapping[str, Any] = self._content["arms"].get(name, {})
        return arm


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json_object(file)
        sound = all(
            isinstance(arm["step"], int) and (arm["failure"] is None or len(arm["failure"]) == 2)
            for arm in content["arms"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ConfigError(f"{file} is damaged. Sweep again with another --output.")
    return content


def _has_log(folder: Path, arm: Mapping[str, Any]) -> bool:
    """Whether the losses of an arm are there; one that failed may have none."""
    return arm["failure"] is not None or (folder / "metrics.jsonl").is_file()


def _differences(saved: Mapping[str, Any], arms: Sequence[Arm], evaluation_rows: str) -> list[str]:
    """What the arms of `saved` have otherwise than those of the same names now."""
    faults = [] if saved.get("evaluation_rows") == evaluation_rows else ["the evaluation rows were others"]
    names = [arm.name for arm in arms]
    faults += [f"{name} is not among the arms now" for name in saved["arms"] if name not in names]
    for arm in arms:
        # An arm may have failed before it wrote its configuration.
        if arm.name in saved["arms"] and (arm.folder / "config.yaml").is_file():
            faults += _changed(load_config(arm.folder), arm.run)
    # A change of run.yaml is one of every arm.
    return list(dict.fromkeys(faults))


def _changed(before: Resolved, after: Resolved) -> list[str]:
    then, now = ({row.key: row.value for row in run.describe()} for run in (before, after))
    return [
        f"{key} was {dump_value(then.get(key))}, is {dump_value(now.get(key))}"
        for key in dict.fromkeys((*then, *now))
        # The folder may have been moved, or named from elsewhere.
        if then.get(key) != now.get(key) and key != "train.output"
    ]
