"""The exception tree: what can go wrong, and with which exit code the command line leaves.

    LoricaError             1   something failed at run time
    ├── ConfigError         2   a configuration or a command line that cannot be meant
    │   └── TargetError     2   targets that match no module of the model
    ├── DataError           3   rows that cannot be read or trained on
    ├── DoesNotFitError     4   out of memory, or predicted to be
    ├── DivergedError       5   the loss became NaN or infinite
    ├── StoppedError  130/143   a signal; a checkpoint was saved first
    ├── ModelError          1   a base folder that cannot be loaded
    ├── AdapterError        1   an adapter folder that cannot be loaded or does not belong to the base
    ├── CheckpointError     1   a checkpoint that is missing, damaged or of another run
    ├── NotMergeableError   1   an adapter that is no fixed change of weights
    └── RunLockedError      1   another process works in the run folder

A message says what failed, what came, what was expected, where, and what to do next. Everything here is for users;
our own invariants are `assert`s.
"""

from __future__ import annotations


class LoricaError(Exception):
    """Base of every error that is meant for the user."""

    exit_code = 1


class ConfigError(LoricaError):
    """A configuration value, file or command line that cannot be meant. Lists every fault at once."""

    exit_code = 2


class TargetError(ConfigError):
    """Targets that match no module, or a module that the method cannot wrap."""


class DataError(LoricaError):
    """Data that cannot be read or trained on."""

    exit_code = 3


class DoesNotFitError(LoricaError):
    """Memory ran out, or is predicted to; the message says what would fit."""

    exit_code = 4


class DivergedError(LoricaError):
    """The loss became NaN or infinite and the policy was to stop."""

    exit_code = 5


class StoppedError(LoricaError):
    """Stopped by a signal after a checkpoint was saved. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ModelError(LoricaError):
    """A base model that cannot be loaded."""


class AdapterError(LoricaError):
    """An adapter folder that cannot be loaded, or does not belong to this base."""


class CheckpointError(LoricaError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class NotMergeableError(LoricaError):
    """An adapter that is not a fixed change of its base's weights."""


class RunLockedError(LoricaError):
    """Another living process works in the run folder."""
