"""`jepa prep preview`: clips as the model gets them."""

from pathlib import Path

from rich.progress import Progress

from pipeline.commands import JsonFlag, Overrides, print_json, print_text
from pipeline.config.load import SHIPPED_CONFIGS, load_config
from pipeline.errors import StorageError, UsageError
from pipeline.run import RunConfig

_DEFAULT = "vitl16"


def preview(
    dataset: Path,
    *overrides: Overrides,
    config: Path | None = None,
    clips: int = 2,
    out: Path | None = None,
    json: JsonFlag = False,
) -> None:
    """Draw clips of a dataset exactly as a run's stages train on them, masks included.

    Args:
        dataset: Folder with shards, index.npy and manifest.json.
        overrides: key=value laid over the configuration.
        config: YAML file of the run; the shipped ViT-L recipe by default.
        clips: Clips to show of each stage.
        out: The picture; DATASET/preview.png by default.
        json: Print what was drawn as JSON.
    """
    from pipeline.report.preview import draw_sheet, stage_previews, with_dataset  # noqa: PLC0415

    if clips < 1:
        raise UsageError(f"expected --clips of at least 1, got {clips}")
    loaded = load_config(config or SHIPPED_CONFIGS / f"{_DEFAULT}.yaml", RunConfig, overrides)
    run = with_dataset(loaded.config, dataset)
    with Progress(transient=True) as progress:
        stages = stage_previews(run, clips)
        previews = list(progress.track(stages, total=len(run.stages), description="loading clips"))
    picture = out or dataset / "preview.png"
    try:
        draw_sheet(previews, picture)
    except OSError as error:
        raise StorageError(f"{picture}: cannot be written: {error.strerror or error}") from error
    if json:
        titles = {p.title: [row.label for row in p.rows] for p in previews}
        print_json({"picture": str(picture), "stages": titles})
        return
    print_text(f"{len(previews)} stages, {clips} clips of each: look at {picture}")
