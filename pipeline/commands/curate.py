"""`jepa prep curate`: sampling weights of a dataset by clusters of its clips."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.commands import JsonFlag, print_json, print_text
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.conduct.curate import CurateReport


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateFlags:
    """How clips are embedded and clustered."""

    clusters: int
    """How many clusters to look for; a hundred clips to each is usual."""
    frames: int = 16
    """Frames of the clip that stands for a sample; it is taken from the sample's middle."""
    fps: float = 4.0
    """Frames per second of it."""
    resolution: int = 256
    """Its height and width in pixels."""
    which: Literal["teacher", "student"] = "teacher"
    """The averaged teacher or the student."""
    seed: int = 0
    """Of the clusters."""


def curate(
    dataset: Path,
    *,
    encoder: Path,
    flags: Annotated[CurateFlags, Parameter(name="*")],
    toward: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    address: str | None = None,
    json: JsonFlag = False,
) -> None:
    """Weight a dataset's samples by clusters of an encoder's features.

    Writes `DATASET/weights.npy`, which the manifest lists from then on, `clusters.json` and
    `clusters.png`. Runs draw by these weights unless their source says `sample_weights: false`.
    Features are kept in `DATASET/.curate`: a run that was stopped goes on, and another number of
    clusters needs no further pass over the videos.

    Args:
        dataset: Folder with shards, index.npy and manifest.json.
        encoder: A run, one of its checkpoints, an exchange folder, or a folder of transformers.
        flags: How clips are embedded and clustered.
        toward: A dataset to resemble, as FOLDER or FOLDER=WEIGHT; may be given several times.
            Without it all clusters are drawn equally often.
        address: Join the Ray cluster at host:port, whose machines must see DATASET and ENCODER.
        json: Print the result as JSON.
    """
    # They bring torch and matplotlib, which the help text does not need.
    from pipeline.conduct.curate import CurateSettings, Target  # noqa: PLC0415
    from pipeline.conduct.curate import curate as weight_samples  # noqa: PLC0415
    from pipeline.conduct.embedding import ClipSize  # noqa: PLC0415

    if flags.clusters < 1 or flags.frames < 1 or flags.fps <= 0 or flags.resolution < 1:
        raise UsageError(
            f"--clusters, --frames, --fps and --resolution must be above 0, got {flags.clusters}, "
            f"{flags.frames}, {flags.fps:g} and {flags.resolution}"
        )
    settings = CurateSettings(
        encoder=encoder.resolve(),
        clusters=flags.clusters,
        clip=ClipSize(frames=flags.frames, fps=flags.fps, resolution=flags.resolution),
        which=flags.which,
        seed=flags.seed,
    )
    targets = [Target(path=path, weight=weight) for path, weight in map(_target, toward)]
    with _bar() as progress:
        task = progress.add_task("embedding", total=None)
        report = weight_samples(
            dataset.resolve(),
            settings,
            targets,
            address=address,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json:
        print_json(asdict(report))
        return
    print_text(_summary(report))


def _summary(report: "CurateReport") -> str:
    return (
        f"{report.dataset}: {report.num_clusters_drawn} of {report.num_clusters} clusters and "
        f"{report.num_samples_drawn} of {report.num_samples} samples are drawn, as varied as "
        f"{report.effective_samples:g} equal ones; {report.num_undecodable} cannot be decoded\n"
        f"weights.npy {report.weights_sha256}\n"
        "runs that were begun before need sample_weights: false of this source to be resumed\n"
        f"look at {report.picture}"
    )


def _target(text: str) -> tuple[Path, float]:
    folder, found, weight = text.rpartition("=")
    if not found:
        return Path(text).resolve(), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = -1.0
    if number <= 0:
        raise UsageError(f"--toward {text}: expected FOLDER=WEIGHT with a weight above 0")
    return Path(folder).resolve(), number


def _bar() -> Progress:
    return Progress(
        TextColumn("embedding shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
