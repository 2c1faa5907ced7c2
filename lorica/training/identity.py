"""May this checkpoint go on as this run? The run's identity is saved beside the weights and compared on resume.

Identity is a mapping of sections. What changes the meaning of the saved numbers (model, method, the order of the data)
must be equal; `data` may differ when the user says so; what only steers the rest of the run (`settings`) may differ,
said aloud.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorica.errors import CheckpointError

FREE_SECTION = "settings"
DATA_SECTION = "data"


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow_data_change: bool = False) -> list[str]:
    """Compare two identities, `{section: {key: JSON value}}`.

    Returns:
        One line for each difference that is allowed, for the user to read.

    Raises:
        CheckpointError: lists every difference that is not.
    """
    warnings, faults, data_changed = [], [], False
    for path, before, after in _differences(saved, now, ""):
        line = f"{path}: {before!r} in the checkpoint, {after!r} now"
        section = path.partition(".")[0]
        if section == FREE_SECTION or (section == DATA_SECTION and allow_data_change):
            warnings.append(line)
        else:
            faults.append(line)
            data_changed |= section == DATA_SECTION
    if faults:
        advice = "Restore these values, or start anew in another train.output."
        if data_changed:
            advice += " Changed data alone can be accepted with --allow-data-change."
        raise CheckpointError("The checkpoint belongs to another run:\n  " + "\n  ".join(faults) + f"\n{advice}")
    return warnings


def _differences(saved: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Each leaf that differs, as (dotted path, before, after); a leaf that is missing counts as None."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*saved, *now)):
            yield from _differences(saved.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif _plain(saved) != _plain(now):
        yield path, saved, now


def _plain(value: Any) -> Any:
    # JSON has no tuples: what was saved as one comes back as a list.
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
