"""Where the probes of storage write: the run's folder, or the one that it will be made in."""

from pathlib import Path

from pipeline.run import RunConfig


def nearest_folder(config: RunConfig) -> Path:
    """The run's folder, or the nearest one above it that is there."""
    folder = config.run_dir.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
