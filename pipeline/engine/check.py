"""What can be wrong with a run before any network is built; imports nothing heavy."""

from pipeline.data.blocks import require_shared_memory
from pipeline.data.clips import open_sources
from pipeline.data.cursor import DataIdentity, data_identity
from pipeline.environment import read_launch
from pipeline.errors import ConfigError
from pipeline.objectives import objective_needs
from pipeline.plan.loading import ready_bytes
from pipeline.redact import secret_variables
from pipeline.run import RunConfig
from pipeline.stages import accumulation
from pipeline.track.metrics import sends_in_clear


def check_run(config: RunConfig, world_size: int) -> DataIdentity:
    """Everything about a run that can be wrong before networks are built.

    Raises:
        ConfigError: The global batch does not divide among the ranks, shards lack a member, or a
            password would go through a network in clear.
        UsageError: A source is no finished dataset.
        DataError: A dataset does not agree with its manifest.
        StorageError: Shared memory is too small for what loader workers keep ready.
    """
    _check_shared_memory(config, world_size)
    _check_credentials(config)
    for stage in config.stages:
        accumulation(stage, config.global_batch, world_size)
    datasets = open_sources(config.data)
    needs = objective_needs(config.objective)
    for source, dataset in zip(config.data.sources, datasets, strict=True):
        missing = sorted(needs - set(dataset.manifest.members))
        if missing:
            raise ConfigError(
                f"Objective {config.objective.kind} needs {', '.join(missing)} of every sample; "
                f"{source.path} has {', '.join(dataset.manifest.members)}.",
                remedy="Prepare the dataset with those members, or leave this source out.",
            )
    return data_identity(config.data, datasets, seed=config.seed, global_batch=config.global_batch)


def _check_credentials(config: RunConfig) -> None:
    names = secret_variables("MLFLOW_TRACKING_")
    if names and sends_in_clear(config.track.mlflow):
        raise ConfigError(
            f"{', '.join(names)} would be sent in clear to {config.track.mlflow.tracking_uri}",
            remedy="Use https for track.mlflow.tracking_uri, or unset the variable.",
        )


def _check_shared_memory(config: RunConfig, world_size: int) -> None:
    data, launch = config.data, read_launch()
    ranks = world_size if launch.launcher == "alone" else launch.local_world_size
    whose = f"{ranks} ranks × {data.workers} workers that keep {data.prefetch + 2} micro-batches"
    require_shared_memory(ready_bytes(config, ranks), whose)
