"""`jepa bench`: steps, attention kernels, loader and stages on the machine at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter
from rich.console import Console

from pipeline.bench.attention import attention_figures, measure_attention
from pipeline.bench.loader import measure_loader
from pipeline.bench.result import document, print_table, spread, write_document
from pipeline.commands import ConfigPath, Overrides, print_text
from pipeline.config.load import load_config
from pipeline.environment import choose_device, prepare_libraries, read_launch
from pipeline.errors import StorageError, UsageError
from pipeline.run import RunConfig
from pipeline.stages import accumulation

Rounds: TypeAlias = Annotated[int, Parameter(help="Measurements; their median counts.")]
StageName: TypeAlias = Annotated[str | None, Parameter(help="One stage; all of them by default.")]
JsonFile: TypeAlias = Annotated[
    Path | None, Parameter(name="--json", help="File that the figures are written to as JSON.")
]
_TOO_LARGE = "no memory"


def step(
    config: ConfigPath,
    *overrides: Overrides,
    stage: StageName = None,
    rounds: Rounds = 8,
    ablate: bool = False,
    json: JsonFile = None,
) -> None:
    """Time, MFU and memory of a training step without data, on one device.

    Args:
        config: YAML file of the run; its data is not read.
        overrides: key=value laid over the file.
        stage: Stage to measure.
        rounds: Steps that are measured.
        ablate: Measure also with each optimisation switched off in turn.
        json: File for the figures.
    """
    run, chosen = _load(config, overrides, stage, rounds, json)
    figures: dict[str, Any] = {}
    rows = []
    for index, name, one in _steps(run, chosen, rounds, ablate=ablate):
        told = {"reason": _TOO_LARGE} if one is None else one.to_dict()
        figures.setdefault(run.stages[index].name, {})[name] = told
        cells = (_TOO_LARGE,) if one is None else _step_cells(one)
        rows.append((run.stages[index].name, name, *cells))
    columns = ("stage", "", "ms", "clips/s", "tokens/s", "MFU", "recomputed", "GiB")
    print_table("A step of one micro-batch", columns, rows)
    _keep("step", figures, run, rounds, json)


def attention(
    config: ConfigPath,
    *overrides: Overrides,
    stage: StageName = None,
    rounds: Rounds = 8,
    json: JsonFile = None,
) -> None:
    """Time of every attention kernel that runs here, on the calls of every stage.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file.
        stage: Stage to measure.
        rounds: Calls that are measured.
        json: File for the figures.
    """
    run, chosen = _load(config, overrides, stage, rounds, json)
    device = choose_device(read_launch())
    figures: dict[str, Any] = {}
    for index in chosen:
        choices = measure_attention(run, index, device, rounds)
        for choice in choices:
            print_text("\n".join(choice.lines()))
        figures |= attention_figures(choices)
    _keep("attention", figures, run, rounds, json)


def loader(
    config: ConfigPath,
    *overrides: Overrides,
    stage: StageName = None,
    rounds: Rounds = 3,
    batches: int = 12,
    json: JsonFile = None,
) -> None:
    """Clips per second that a configuration's loader gives, with its workers and data.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file.
        stage: Stage to measure.
        rounds: Times that the loader is started.
        batches: Micro-batches of each time.
        json: File for the figures.
    """
    run, chosen = _load(config, overrides, stage, rounds, json)
    if batches < 1:
        raise UsageError(f"expected --batches of at least 1, got {batches}")
    figures: dict[str, Any] = {}
    for index in chosen:
        found = [measure_loader(run, index, batches, first=n * batches) for n in range(rounds)]
        figures[run.stages[index].name] = {
            "clips_per_second": spread([one.clips_per_second for one in found]),
            "clips_per_cpu_second": spread([one.clips_per_cpu_second for one in found]),
            "clips": found[0].clips,
        }
    rows = [
        (name, f["clips_per_second"]["median"], f["clips_per_cpu_second"]["median"])
        for name, f in figures.items()
    ]
    columns = ("stage", "clips/s", "clips/CPU second")
    print_table(f"Loader with {run.data.workers} workers", columns, rows)
    _keep("loader", figures, run, rounds, json)


def stages(
    config: ConfigPath,
    *overrides: Overrides,
    rounds: Rounds = 8,
    devices: int = 1,
    json: JsonFile = None,
) -> None:
    """What the schedule saves: measured steps of every stage, beside the last size throughout.

    Args:
        config: YAML file of the run; its data is not read.
        overrides: key=value laid over the file.
        rounds: Steps that are measured in each stage.
        devices: Devices that are to share the global batch; communication is not measured.
        json: File for the figures.
    """
    run, chosen = _load(config, overrides, None, rounds, json)
    if devices < 1:
        raise UsageError(f"expected --devices of at least 1, got {devices}")
    for one in run.stages:
        accumulation(one, run.global_batch, devices)  # before anything is measured
    from pipeline.bench.stages import measure_stages, schedule_figures  # noqa: PLC0415
    from pipeline.bench.step import measuring  # noqa: PLC0415

    with _telling() as say, measuring() as device:
        say("all stages")
        found = measure_stages(run, chosen, device, rounds)
    schedule = schedule_figures(run, found, devices)
    rows = [(one.stage, *_step_cells(one)) for one in found]
    columns = ("stage", "ms", "clips/s", "tokens/s", "MFU", "recomputed", "GiB")
    print_table("A step of one micro-batch", columns, rows)
    print_text(
        f"{schedule.device_hours:.3g} device hours; {schedule.device_hours_at_last_size:.3g} if "
        f"every step were of the last stage's size: {schedule.time_ratio:.2f} times as many. By "
        f"FLOPs {schedule.flop_ratio:.2f} times; the paper tells of {schedule.paper_ratio} for "
        "ViT-g."
    )
    figures = {"stages": [one.to_dict() for one in found], "schedule": asdict(schedule)}
    _keep("stages", figures, run, rounds, json)


def _load(
    config: Path, overrides: Sequence[str], stage: str | None, rounds: int, json: Path | None
) -> tuple[RunConfig, list[int]]:
    if rounds < 1:
        raise UsageError(f"expected --rounds of at least 1, got {rounds}")
    if json is not None:
        # Not after minutes of measuring. What is there stays until the figures are.
        with _written(json):
            json.parent.mkdir(parents=True, exist_ok=True)
            json.open("a").close()
    prepare_libraries(Path.home() / ".cache" / "jepa" / "torch_extensions")
    run = load_config(config, RunConfig, overrides).config
    names = [one.name for one in run.stages]
    if stage is None:
        return run, list(range(len(names)))
    if stage not in names:
        raise UsageError(f"expected --stage to be one of {', '.join(names)}, got {stage}")
    return run, [names.index(stage)]


def _steps(
    run: RunConfig, chosen: Sequence[int], rounds: int, *, ablate: bool
) -> Iterator[tuple[int, str, Any]]:
    """Stage, what was altered and figures of everything that is to be measured."""
    # DeepSpeed reads its settings from the environment when it is imported, and takes seconds.
    from pipeline.bench.ablate import measure_each  # noqa: PLC0415
    from pipeline.bench.stages import measure_stages  # noqa: PLC0415
    from pipeline.bench.step import measuring  # noqa: PLC0415

    with _telling() as say:
        if ablate:
            for index in chosen:
                for name, one in measure_each(run, index, rounds, say):
                    yield index, name, one
            return
        say(", ".join(run.stages[index].name for index in chosen))
        with measuring() as device:
            found = measure_stages(run, chosen, device, rounds)
    yield from ((i, "", one) for i, one in zip(chosen, found, strict=True))


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being measured, since it takes minutes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _words: None
        return
    with console.status("measuring") as status:
        yield lambda words: status.update(f"measuring {words}")


def _step_cells(one: Any) -> tuple[str, ...]:
    seconds = one.gradient_seconds + one.update_seconds
    return (
        f"{1e3 * seconds:.1f}",
        f"{one.clips_per_second:.2f}",
        f"{one.tokens_per_second:,.0f}",
        "–" if one.mfu is None else f"{one.mfu:.1%}",
        f"{one.recomputed_share:.0%}",
        "–" if one.peak_memory_gib is None else f"{one.peak_memory_gib:.1f}",
    )


def _keep(
    name: str, figures: Mapping[str, Any], run: RunConfig, rounds: int, path: Path | None
) -> None:
    if path is None:
        return
    settings = {"rounds": rounds, "config": run.model_dump(mode="json")}
    with _written(path):
        write_document(path, document(name, figures, settings))
    print_text(f"written to {path}")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
