"""Networks ready to use, for evaluators and for our own probes."""

from pathlib import Path
from typing import Literal, TypeVar

from pipeline.errors import CheckpointError
from pipeline.exchange.open import open_networks
from pipeline.exchange.sizes import new_encoder, new_predictor
from pipeline.exchange.source import Source
from pipeline.exchange.tensors import Tensors
from pipeline.models.encoder import Encoder
from pipeline.models.predictor import Predictor

_Network = TypeVar("_Network", Encoder, Predictor)


def load_encoder(
    path: Path | str,
    *,
    which: Literal["teacher", "student"] = "teacher",
    step: int | None = None,
) -> Encoder:
    """A frozen encoder in fp32 on the CPU, from whatever holds one.

    `encoder(video_BCTHW)` gives [B, N, D] after the final norm, with the video normalised by
    ImageNet's mean and deviation (`pipeline.data.augment.normalise` does it from uint8).

    Args:
        path: A run, one of its checkpoints, an exchange folder, or a folder of transformers.
        which: The averaged teacher, which evaluations use, or the student; where a folder holds
            one encoder it is that one.
        step: Which checkpoint of a run; the newest otherwise.

    Raises:
        UsageError: There is nothing of the kind at `path`.
        CheckpointError: It is damaged, holds the other encoder alone, or numbers that are not
            finite, whose features would be scored like any others.
    """
    return build_encoder(open_networks(Path(path), step), which)


def build_encoder(source: Source, which: Literal["teacher", "student"]) -> Encoder:
    """The encoder of networks that are open.

    Raises:
        CheckpointError: They hold the other encoder alone.
    """
    role = source.networks.encoder_is
    if not source.has_teacher and role not in ("unknown", which):
        raise CheckpointError(
            f"{source.provenance.get('exchange', source.provenance['source'])} holds the {role}'s "
            f"weights alone, the {which}'s were asked for.",
            remedy=f"Ask for the {role}, on the command line with --which {role}.",
        )
    return _filled(new_encoder(source.networks), source.encoder(which))


def build_predictor(source: Source) -> Predictor:
    """The predictor of networks that are open.

    Raises:
        CheckpointError: They have none.
    """
    return _filled(new_predictor(source.networks), source.tensors.below("predictor."))


def _filled(module: _Network, tensors: Tensors) -> _Network:
    state = {name: tensor.float() for name, tensor in tensors.finite()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
