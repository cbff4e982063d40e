"""`jepa plan`: what a run will cost, before it is started."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, RenderableType

from pipeline.commands import ConfigPath, JsonFlag, Overrides, print_json
from pipeline.config.load import load_config
from pipeline.errors import StorageError, UsageError
from pipeline.plan.cluster import Cluster
from pipeline.plan.estimate import plan_run
from pipeline.plan.evidence import ALL, USUAL_UTILISATION
from pipeline.plan.scale_table import render_scaling
from pipeline.plan.scaling import Scaling, numbers_between, scale
from pipeline.plan.table import render
from pipeline.run import RunConfig

_MOST_GPUS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What a plan reckons with besides the configuration."""

    utilisation: float = USUAL_UTILISATION
    """Share of the peak that goes into model FLOPs, where no cluster is given: 0.2 to 0.45 was
    published for networks of this kind, `jepa bench step` measures yours."""
    peak_tflops: float = 989.0
    """Dense peak of one GPU in TFLOP/s, where no cluster is given: 989 for an H100 or H200 in
    bf16, 312 for an A100."""
    cluster: Path | None = None
    """YAML file of a cluster's figures: adds step times, network, failures, cost."""
    keep_recipe: bool = False
    """Keep the configuration's micro-batches and ZeRO stage instead of looking for better ones."""
    picture: Path | None = None
    """With a cluster or a range of GPUs: also write the curves to this PNG, SVG or PDF file."""


def plan(
    config: ConfigPath,
    *overrides: Overrides,
    gpus: str | None = None,
    masks: Path | None = None,
    options: Annotated[PlanOptions | None, Parameter(name="*")] = None,
    json: JsonFlag = False,
) -> None:
    """Tokens, FLOPs, memory per GPU and GPU-hours of every stage of a run.

    With `--cluster FILE`, or `--gpus 1..4096`, also the time of a step with its network, the best
    ZeRO stage and micro-batches, and what finishing takes with saves, failures and restarts.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        gpus: GPUs to plan for, or a range such as 1..4096; by default the most that divide every
            stage.
        masks: Also write this HTML page: what masks keep of a clip over its time, by every rule.
        options: What else is reckoned with.
        json: Print the plan as JSON.
    """
    chosen = options or PlanOptions()
    numbers = None if gpus is None else _numbers(gpus)
    _must_be_possible(chosen, numbers)
    run = load_config(config, RunConfig, overrides).config
    if masks is not None:
        _write(masks, lambda path: _masks_page(run, path))
    result: dict[str, Any] = {}
    parts: list[RenderableType] = []
    if numbers is None or len(numbers) == 1:
        planned = plan_run(
            run,
            num_gpus=None if numbers is None else numbers[0],
            utilisation=chosen.utilisation,
            peak_tflops=chosen.peak_tflops,
        )
        result, numbers = asdict(planned), (planned.machine.num_gpus,)
        parts += render(planned)
    if len(numbers) == 2 or chosen.cluster is not None:
        scaling = _scaling(run, numbers, chosen)
        result["scaling"] = asdict(scaling) | {
            "cluster": scaling.cluster.model_dump(),
            "evidence": [asdict(one) | {"error": one.error} for one in ALL],
        }
        parts += render_scaling(scaling)
    _show(result, parts, as_json=json)


def _show(result: dict[str, Any], parts: Sequence[RenderableType], *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def _scaling(run: RunConfig, numbers: tuple[int, ...], options: PlanOptions) -> Scaling:
    cluster = load_config(options.cluster, Cluster).config if options.cluster else Cluster()
    if len(numbers) == 2:
        gpus = numbers_between(numbers[0], numbers[1], run.global_batch)
    else:
        gpus = list(numbers)
    scaling = scale(run, cluster, gpus, keep_recipe=options.keep_recipe)
    if options.picture is not None:
        _write(options.picture, lambda path: _picture(scaling, path))
    return scaling


def _numbers(words: str) -> tuple[int, ...]:
    """`128` or `1..4096`."""
    first, dots, last = words.partition("..")
    try:
        numbers = (int(first), int(last)) if dots else (int(first),)
    except ValueError:
        numbers = ()
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= _MOST_GPUS:
        raise UsageError(f"expected --gpus of at least 1, or a range as 1..4096, got {words}")
    return numbers


def _must_be_possible(options: PlanOptions, numbers: tuple[int, ...] | None) -> None:
    if not 0.0 < options.utilisation <= 1.0:
        raise UsageError(f"expected --utilisation above 0 and at most 1, got {options.utilisation}")
    if not 0.0 < options.peak_tflops < math.inf:
        raise UsageError(f"expected --peak-tflops above 0, got {options.peak_tflops}")
    if options.picture is not None and options.picture.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"expected --picture as a .png, .svg or .pdf, got {options.picture}")
    is_scaled = options.cluster is not None or len(numbers or ()) == 2
    if options.picture is not None and not is_scaled:
        raise UsageError(
            "expected --picture with numbers of GPUs to draw curves over, got one alone",
            remedy="Give a range as --gpus 1..4096, or a --cluster FILE.",
        )


# Drawing needs matplotlib, which takes its time to import.
def _masks_page(run: RunConfig, path: Path) -> None:
    from pipeline.report.masks import write_masks_page  # noqa: PLC0415

    write_masks_page(run, path)


def _picture(scaling: Scaling, path: Path) -> None:
    from pipeline.report.scaling import write_scaling_picture  # noqa: PLC0415

    write_scaling_picture(scaling, path)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
