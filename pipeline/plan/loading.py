"""What loading clips takes of a machine: shared memory, and processor cores for each GPU."""

from pipeline.run import RunConfig
from pipeline.stages import Stage


def ready_bytes(config: RunConfig, ranks: int) -> int:
    """Shared memory of all loader workers of a machine, largest stage: what they keep ready.

    Per worker the micro-batches that it keeps ready, the one in training, and the one before it.
    """
    data = config.data
    largest = max(
        stage.micro_batch * stage.frames * stage.resolution**2 * 3 for stage in config.stages
    )
    return ranks * data.workers * (data.prefetch + 2) * largest


def cores_per_gpu(
    stage: Stage, clips_per_gpu_second: float, frames_per_core_second: float
) -> float:
    """Cores that decode as many clips as one GPU trains on."""
    return clips_per_gpu_second * stage.frames / frames_per_core_second
