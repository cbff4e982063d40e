"""What can be wrong with a run before any network is built; imports nothing heavy."""

from pipeline.data.clips import open_sources
from pipeline.data.cursor import DataIdentity, data_identity
from pipeline.errors import ConfigError
from pipeline.objectives import objective_needs
from pipeline.run import RunConfig
from pipeline.stages import accumulation


def check_run(config: RunConfig, world_size: int) -> DataIdentity:
    """Everything about a run that can be wrong before networks are built.

    Raises:
        ConfigError: The global batch does not divide among the ranks, or shards lack a member.
        UsageError: A source is no finished dataset.
        DataError: A dataset does not agree with its manifest.
    """
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
