"""The encoders and clips that feature maps are drawn from: a run's own, first and last."""

from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint.layout import Commit, list_commits
from pipeline.checkpoint.load import load_encoder_state
from pipeline.clip import Clip, MicroBatchPlan
from pipeline.data.clips import LoadClip, make_order, open_sources
from pipeline.errors import CheckpointError
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.report.features import FeatureMapRow, feature_map_rows
from pipeline.run import RunConfig
from pipeline.stages import place_of_step


def draw_feature_maps(run_dir: Path, config: RunConfig, *, num_clips: int) -> list[FeatureMapRow]:
    """What the run's untrained and newest teacher make of the first clips of its data.

    Clips are whole pictures, not the random crops of training, in the size of the last stage that
    the newest checkpoint has reached.

    Args:
        run_dir: The run's folder.
        config: Its configuration.
        num_clips: How many clips.

    Raises:
        CheckpointError: There is no checkpoint, or one does not fit the configuration.
        UsageError: The data is not where the configuration says.
        DataError: The data cannot be decoded.
    """
    commits = list_commits(run_dir)
    if not commits:
        raise CheckpointError(
            f"{run_dir} has no checkpoint to draw feature maps from.",
            remedy="Leave them out with --no-feature-maps, or wait for the first checkpoint.",
        )
    chosen = {commit.step: commit for commit in (commits[0], commits[-1])}
    encoders = {_name(commit): load_teacher(config, commit) for commit in chosen.values()}
    plan = clip_plan(config, max(commits[-1].step, 1), num_clips)
    return feature_map_rows(encoders, whole_clips(config, plan), plan.grid)


def load_teacher(config: RunConfig, commit: Commit) -> nn.Module:
    """The averaged encoder of a checkpoint, ready to be read on the CPU.

    Raises:
        CheckpointError: The weights do not fit the configuration.
    """
    options = BuildOptions(
        # The run's own kernel may need a GPU; the result is the same.
        attention=config.attention.model_copy(update={"backend": "sdpa"}),
        checkpoint_activations=False,
    )
    with torch.device("meta"):
        encoder = build_objective(config.objective, options).encoder()
    try:
        encoder.load_state_dict(load_encoder_state(commit.path, "teacher"), assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{commit.path} does not fit config.yaml: {error}") from error
    return encoder.eval().requires_grad_(False)


def _name(commit: Commit) -> str:
    return f"step {commit.step}" if commit.step else "untrained"


def clip_plan(config: RunConfig, step: int, num_clips: int) -> MicroBatchPlan:
    """The first clips of a run's order, in the size of the stage that a step belongs to."""
    place = place_of_step(config.stages, step)
    stage = place.stage
    return MicroBatchPlan(
        step=step,
        stage=place.index,
        first_position=0,
        size=num_clips,
        frames=stage.frames,
        fps=stage.fps,
        resolution=stage.resolution,
        masks=(),
        grid=config.grid(stage.frames, stage.resolution),
    )


def whole_clips(config: RunConfig, plan: MicroBatchPlan) -> list[Clip]:
    """The clips of a plan, uncropped but for the longer side.

    Raises:
        UsageError: The data is not where the configuration says.
        DataError: The data cannot be decoded.
    """
    whole = {"crop_scale": (1.0, 1.0), "crop_aspect_ratio": (1.0, 1.0), "horizontal_flip": 0.0}
    data = config.data.model_copy(update=whole)
    datasets = open_sources(data)
    order = make_order(data, datasets, config.seed)
    load = LoadClip(config=data, order=order, datasets=datasets)
    return [load(position, plan) for position in plan.positions]
