"""An export against transformers itself; the only importer of it, and only where it is."""

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.clip import MaskSet
from pipeline.data.augment import transforms
from pipeline.errors import CheckpointError
from pipeline.exchange.heads import HeadWeights
from pipeline.exchange.layout import Networks
from pipeline.exchange.load import build_encoder, build_predictor
from pipeline.exchange.source import Source
from pipeline.exchange.tensors import Tensors

# Positions in time are the same at any length, so a few frames tell as much as many.
_TUBELETS = 2
_SEED = 20260101
_FIRST_VERSION = 5
# Far above rounding in fp32, far below what a wrong position or a swapped tensor does.
_MOST = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Largest absolute differences of outputs, fp32, on one random clip of the export's crop."""

    encoder: float
    predictor: float
    transformers: str
    """Its version."""
    logits: float | None = None
    """Of the head, where there is one, on one random clip."""


def measure(
    folder: Path, networks: Networks, tensors: Tensors, head: HeadWeights | None = None
) -> Difference | None:
    """Loads an export strictly with transformers and compares it with our networks.

    Args:
        folder: The export.
        networks: What was exported; resolution must be known.
        tensors: `encoder.*` and `predictor.*`.
        head: The head in it, if there is one.

    Returns:
        None if transformers is not installed, or is older than 5.

    Raises:
        CheckpointError: transformers does not find exactly its own tensors in the export, or
            computes something else with them.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    version = metadata.version("transformers")
    if int(version.partition(".")[0]) < _FIRST_VERSION:
        return None  # its names and its loader were others
    frames = _TUBELETS * networks.encoder.tubelet_size
    generator = torch.Generator().manual_seed(_SEED)
    side = networks.resolution or 0
    video_BCTHW = torch.randn(1, 3, frames, side, side, generator=generator)
    grid = networks.encoder.grid(frames, side)
    order = torch.randperm(grid.num_tokens, generator=generator)[None]
    half = grid.num_tokens // 2
    mask = MaskSet(
        context_BK=order[:, :half].sort(1).values, target_BK=order[:, half:].sort(1).values
    )
    # One after the other: two copies of a large model need not be in memory at once.
    ours = _ours(Source(networks=networks, tensors=tensors, provenance={}), video_BCTHW, mask)
    theirs = _theirs(folder, video_BCTHW, mask, head)
    if head is not None:
        with torch.no_grad():
            ours = (*ours, head.build()(ours[0]))
    apart = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    encoder, predictor = apart[:2]
    scale = max(1.0, *(float(one.abs().max()) for one in ours))
    # NaN is not below anything.
    if not all(one <= _MOST * scale for one in apart):
        raise CheckpointError(
            f"transformers {version} computes something else with these weights: largest "
            f"difference {encoder:.2e} in the encoder, {predictor:.2e} in the predictor"
            + (f", {apart[2]:.2e} in the logits." if head is not None else "."),
            remedy="Please report this; --no-check exports without comparing.",
        )
    return Difference(
        encoder=encoder,
        predictor=predictor,
        transformers=version,
        logits=apart[2] if head is not None else None,
    )


@torch.no_grad()
def _ours(source: Source, video_BCTHW: Tensor, mask: MaskSet) -> tuple[Tensor, Tensor]:
    role = source.networks.encoder_is
    encoder = build_encoder(source, "student" if role == "student" else "teacher")
    features_BND = encoder(video_BCTHW)
    grid = source.networks.encoder.grid_of(*video_BCTHW.shape[2:])
    predictor = build_predictor(source)
    # transformers always takes the second mask token, or the first if there is one.
    token = 1 % predictor.config.num_mask_tokens
    index = mask.context_BK.unsqueeze(-1).expand(-1, -1, features_BND.shape[-1])
    return features_BND, predictor(features_BND.gather(1, index), mask, grid, mask_token=token)


@torch.no_grad()
def _theirs(
    folder: Path, video_BCTHW: Tensor, mask: MaskSet, head: HeadWeights | None
) -> tuple[Tensor, ...]:
    transforms()  # transformers imports torchvision, which needs help beside a CPU-only torch
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModel
    if head is not None:
        kind = transformers.AutoModelForVideoClassification
    model, told = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in told.items() if value}
    if wrong:
        raise CheckpointError(
            f"transformers does not load the export strictly: {wrong}",
            remedy="Please report this with the command that you gave.",
        )
    model.eval()
    video_BTCHW = video_BCTHW.transpose(1, 2)
    networks = model if head is None else model.vjepa2
    found = networks(video_BTCHW, context_mask=[mask.context_BK], target_mask=[mask.target_BK])
    both = found.last_hidden_state, found.predictor_output.last_hidden_state
    return both if head is None else (*both, model(video_BTCHW).logits)
