"""`jepa plan`: what a run will cost, before it is started."""

import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pipeline.commands import ConfigPath, JsonFlag, Overrides, print_json
from pipeline.config.load import load_config
from pipeline.errors import StorageError, UsageError
from pipeline.plan.estimate import plan_run
from pipeline.plan.table import render
from pipeline.run import RunConfig


def plan(
    config: ConfigPath,
    *overrides: Overrides,
    gpus: int | None = None,
    utilisation: float = 0.4,
    peak_tflops: float = 989.0,
    masks: Path | None = None,
    json: JsonFlag = False,
) -> None:
    """Tokens, FLOPs, memory per GPU and GPU-hours of every stage of a run.

    Args:
        config: YAML file of the run.
        overrides: key=value laid over the file; list items by position, as stages.0.steps=100.
        gpus: GPUs to plan for; by default the most that divide every stage.
        utilisation: Share of the peak that goes into model FLOPs; 0.3 to 0.4 is usual.
        peak_tflops: Dense peak of one GPU in TFLOP/s: 989 for an H100 or H200 in bf16, 312 for
            an A100.
        masks: Also write this HTML page: what masks keep of a clip over its time, by every rule.
        json: Print the plan as JSON.
    """
    if gpus is not None and gpus < 1:
        raise UsageError(f"expected --gpus of at least 1, got {gpus}")
    if not 0.0 < utilisation <= 1.0:
        raise UsageError(f"expected --utilisation above 0 and at most 1, got {utilisation}")
    if not 0.0 < peak_tflops < math.inf:
        raise UsageError(f"expected --peak-tflops above 0, got {peak_tflops}")
    loaded = load_config(config, RunConfig, overrides)
    planned = plan_run(
        loaded.config, num_gpus=gpus, utilisation=utilisation, peak_tflops=peak_tflops
    )
    if masks is not None:
        _write_masks(loaded.config, masks)
    if json:
        print_json(asdict(planned))
        return
    console = Console(highlight=False)
    for part in render(planned):
        console.print(part)


def _write_masks(config: RunConfig, path: Path) -> None:
    # Drawing needs matplotlib, which takes its time to import.
    from pipeline.report.masks import write_masks_page  # noqa: PLC0415

    try:
        write_masks_page(config, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
