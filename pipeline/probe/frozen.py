"""The encoder under test: read from a checkpoint, never changed."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.checkpoint.load import load_encoder_state
from pipeline.clip import Grid
from pipeline.config.load import load_config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.probe.tasks import TaskConfig
from pipeline.run import RunConfig
from pipeline.track.folder import CONFIG_FILE

Which = Literal["teacher", "student"]


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """An encoder that is only read, and what the clips of a task look like to it."""

    module: nn.Module
    digest: str
    """SHA-256 over its configuration and the names, shapes and bytes of its weights."""
    width: int
    grid: Grid
    """Tokens of one segment."""
    device: torch.device
    autocast: torch.dtype | None = None


def load_frozen(commit_dir: Path, which: Which, task: TaskConfig) -> FrozenEncoder:
    """The encoder of a run's checkpoint, in evaluation mode, on the accelerator if there is one.

    Args:
        commit_dir: `RUN/checkpoints/step-…`; the run's configuration lies beside it.
        which: The averaged teacher or the student.
        task: Decides the size of clips and the precision.

    Raises:
        CheckpointError: The commit is damaged, or its weights do not fit the run's configuration.
        ConfigError: The encoder cannot take the task's clips.
    """
    config = load_config(commit_dir.parent.parent / CONFIG_FILE, RunConfig).config
    options = BuildOptions(
        # The run's kernel may not be there on the machine that evaluates; the result is the same.
        attention=AttentionConfig(backend="sdpa", rope=config.attention.rope),
        checkpoint_activations=False,
    )
    with torch.device("meta"):  # only the shapes: weights come from the checkpoint
        module = build_objective(config.objective, options).encoder()
    state = load_encoder_state(commit_dir, which)
    _load_strictly(module, state, commit_dir)
    return freeze(module, task)


def freeze(module: nn.Module, task: TaskConfig) -> FrozenEncoder:
    """An encoder as a task uses it.

    Raises:
        ConfigError: It is no video encoder, or cannot take the task's clips.
    """
    if not isinstance(module, Encoder):
        raise ConfigError(f"probes need a video encoder, got {type(module).__name__}")
    clip = task.clip
    grid = module.config.grid(clip.frames, clip.resolution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda" and task.precision == "bf16"
    digest = _digest(module)
    return FrozenEncoder(
        module=module.to(device).eval().requires_grad_(False),
        digest=digest,
        width=module.config.dims.width,
        grid=grid,
        device=device,
        autocast=torch.bfloat16 if half else None,
    )


def _load_strictly(module: nn.Module, state: dict[str, Tensor], commit_dir: Path) -> None:
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {commit_dir} do not fit the run's {CONFIG_FILE}: {error}",
            remedy=f"Restore the {CONFIG_FILE} that the run was trained with.",
        ) from error


def _digest(module: Encoder) -> str:
    digest = sha256(f"{module.config!r} {module.attention.rope}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
