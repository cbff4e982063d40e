"""The encoder under test: read from a checkpoint, never changed."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipeline.clip import Grid
from pipeline.errors import ConfigError
from pipeline.exchange import load_encoder
from pipeline.models.encoder import Encoder
from pipeline.probe.tasks import TaskConfig

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


def load_frozen(source: Path, which: Which, task: TaskConfig) -> FrozenEncoder:
    """An encoder in evaluation mode, on the accelerator if there is one.

    Args:
        source: `RUN/checkpoints/step-…`, an exchange folder, or a folder of transformers.
        which: The averaged teacher or the student.
        task: Decides the size of clips and the precision.

    Raises:
        CheckpointError: It is damaged, or its weights do not fit what it says they are.
        ConfigError: The encoder cannot take the task's clips.
    """
    return freeze(load_encoder(source, which=which), task)


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
    digest = encoder_digest(module)
    return FrozenEncoder(
        module=module.to(device).eval().requires_grad_(False),
        digest=digest,
        width=module.config.dims.width,
        grid=grid,
        device=device,
        autocast=torch.bfloat16 if half else None,
    )


def encoder_digest(module: Encoder) -> str:
    """SHA-256 over an encoder's configuration and the names, shapes and bytes of its weights."""
    # The kernel does not count: the features are the same.
    places = module.attention.model_dump(mode="json", exclude={"backend"})
    digest = sha256(f"{module.config!r} {places}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
