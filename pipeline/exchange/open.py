"""Networks from wherever they are: a run, its checkpoints, exchange folders, transformers' folders.

Needs neither DeepSpeed nor Ray nor a process group.
"""

from pathlib import Path

import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.load import find_commit
from pipeline.checkpoint.load import verify as find_problems
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.config.load import load_config
from pipeline.errors import CheckpointError, ConfigError, UsageError
from pipeline.exchange.hf_import import is_hf, read_hf
from pipeline.exchange.layout import Networks, is_exchange, portable, read_exchange
from pipeline.exchange.names import refuse_misfits
from pipeline.exchange.sizes import expected_shapes
from pipeline.exchange.source import ImportOptions, Source
from pipeline.exchange.tensors import Tensors, open_safetensors
from pipeline.models.encoder import Encoder
from pipeline.models.predictor import Predictor
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.run import RunConfig
from pipeline.stages import place_of_step
from pipeline.track.folder import CONFIG_FILE

WHAT_IS_TAKEN = (
    "Give a run's folder, one of its checkpoints, a folder that `jepa ckpt import` or `jepa ckpt "
    "export` made, or a folder of transformers' VJEPA2Model."
)


def open_networks(path: Path, step: int | None = None, *, verify: bool = True) -> Source:
    """Networks of a folder of any kind, everything in it verified.

    Args:
        path: A run, a checkpoint, an exchange folder, or a folder of transformers.
        step: Which checkpoint of a run; the newest that is whole otherwise.
        verify: Compare every byte with its digest; False where another process just has.

    Raises:
        UsageError: The path is nothing of the kind.
        CheckpointError: It is damaged, or its weights do not fit what it says of itself.
    """
    if (path / layout.MANIFEST).is_file() or (path / CONFIG_FILE).is_file():
        return _of_commit(_commit(path, step, verify=verify))
    if step is not None:
        raise UsageError(f"{path} is no run: --step chooses among the checkpoints of one")
    if is_exchange(path):
        return _of_exchange(path, verify=verify)
    if is_hf(path):
        return read_hf(path, ImportOptions(), digest=verify)
    if path.is_file():
        raise UsageError(
            f"{path} is a file.",
            remedy=f"Read it first: `jepa ckpt import {path} --format vjepa2 OUT`, then give OUT.",
        )
    raise UsageError(f"expected networks at {path}, found none", remedy=WHAT_IS_TAKEN)


def _commit(path: Path, step: int | None, *, verify: bool) -> Path:
    if not (path / layout.MANIFEST).is_file():
        return find_commit(path, step).commit.path
    if step is not None:
        raise UsageError(f"{path} is one checkpoint: --step chooses among those of a run")
    problems = find_problems(path) if verify else []
    if problems:
        raise CheckpointError(f"{path} is not whole: {'; '.join(problems)}")
    return path


def _of_commit(commit_dir: Path) -> Source:
    run_dir = commit_dir.parent.parent
    if not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{commit_dir} is away from its run, whose {CONFIG_FILE} tells the sizes.",
            remedy="Put it back into the run's folder `checkpoints`, and export it from there.",
        )
    config = load_config(run_dir / CONFIG_FILE, RunConfig).config
    manifest = layout.read_manifest(commit_dir)
    # The untrained weights, too, were made for the first stage.
    stage = place_of_step(config.stages, min(max(1, manifest.step), config.num_steps)).stage
    networks = networks_of_run(config).model_copy(
        update={"frames": stage.frames, "resolution": stage.resolution}
    )
    tensors = commit_tensors(commit_dir)
    teacher = any(name.startswith("teacher.") for name in tensors.shapes)
    _check(tensors, networks, str(commit_dir), teacher=teacher)
    provenance = {
        "format": "jepa",
        "source": str(commit_dir),
        "run_id": manifest.run_id,
        "run": config.name,
        "step": manifest.step,
    }
    return Source(networks=networks, tensors=tensors, provenance=provenance, commit_dir=commit_dir)


def networks_of_run(config: RunConfig) -> Networks:
    """What a run trains, as far as it is an encoder with or without a predictor.

    Raises:
        ConfigError: Its objective has no video encoder.
    """
    attention = portable(config.attention)
    with torch.device("meta"):
        options = BuildOptions(attention=attention, checkpoint_activations=False)
        modules = dict(build_objective(config.objective, options).modules().items())
    encoder, predictor = modules.get("encoder"), modules.get("predictor")
    if not isinstance(encoder, Encoder):
        raise ConfigError("This run's objective has no video encoder under the name `encoder`.")
    return Networks(
        encoder=encoder.config,
        predictor=predictor.config if isinstance(predictor, Predictor) else None,
        attention=attention,
        encoder_is="student",
    )


def commit_tensors(commit_dir: Path) -> Tensors:
    """All weights of a verified commit, fp32, each read whole when it is asked for."""
    commit = CommitTensors(commit_dir, with_optimizer=False)
    shapes = {name: commit.shape_of(name) or () for name in commit.names()}
    return Tensors(shapes=shapes, read=commit.whole)


def _of_exchange(folder: Path, *, verify: bool) -> Source:
    exchange = read_exchange(folder, verify=verify)
    tensors = open_safetensors(folder / file.path for file in exchange.files)
    teacher = any(name.startswith("teacher.") for name in tensors.shapes)
    _check(tensors, exchange.networks, str(folder), teacher=teacher)
    provenance = {**exchange.provenance, "exchange": str(folder), "digest": exchange.digest}
    notes = tuple(str(note) for note in exchange.provenance.get("notes", ()))
    return Source(networks=exchange.networks, tensors=tensors, provenance=provenance, notes=notes)


def _check(tensors: Tensors, networks: Networks, source: str, *, teacher: bool) -> None:
    expected = expected_shapes(networks, teacher=teacher)
    shared = set(expected) & set(tensors.shapes)
    refuse_misfits(
        source,
        missing=[name for name in expected if name not in tensors.shapes],
        unknown=sorted(set(tensors.shapes) - set(expected)),
        wrong=[
            f"{name}: expected {expected[name]}, got {tensors.shapes[name]}"
            for name in sorted(shared)
            if expected[name] != tuple(tensors.shapes[name])
        ],
    )
