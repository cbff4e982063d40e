"""How large checkpoints are, how many lie in a run's folder, and how long they take."""

from pipeline.checkpoint.layout import CheckpointConfig
from pipeline.plan.memory import trained_params
from pipeline.run import RunConfig
from pipeline.stages import total_steps

_FLOAT = 4


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: fp32 weights, Adam's two moments, and the teacher's average."""
    student, teacher = trained_params(config)
    return _FLOAT * (3 * student + teacher)


def kept_checkpoints(config: RunConfig) -> int:
    """Checkpoints that lie in the run's folder at most, the one being written included."""
    saving = config.checkpoint
    # The untrained weights, the last ones, the newest few, and a save in flight.
    kept = saving.keep_last + 3
    if saving.keep_every_steps is not None:
        kept += total_steps(config.stages) // saving.keep_every_steps
    return kept


def planned_interval_seconds(saving: CheckpointConfig, step_seconds: float) -> float | None:
    """Time between two saves by the configuration; None where the run chooses it (`auto`)."""
    if saving.every_minutes is not None:
        return 60.0 * saving.every_minutes
    if isinstance(saving.every_steps, int):
        return saving.every_steps * step_seconds
    return None
