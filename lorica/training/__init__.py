"""The training core: steps, checkpoints, metrics, the lock on a run folder. `loop.py` is the page to read first."""
