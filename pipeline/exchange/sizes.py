"""Sizes of networks, read off their tensors. Heads alone leave no trace and have to be known."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, get_args

import torch
from pydantic import ValidationError

from pipeline.errors import CheckpointError
from pipeline.exchange.layout import Networks
from pipeline.exchange.tensors import Shape, Tensors
from pipeline.models.encoder import Encoder, EncoderConfig, Size
from pipeline.models.predictor import Predictor, PredictorConfig

_Config = TypeVar("_Config", EncoderConfig, PredictorConfig)
# Every predictor of V-JEPA 2 has this width and as many heads.
_PREDICTOR_WIDTH, _PREDICTOR_HEADS = 384, 12
_MOST = {"depth": 1 << 10, "width": 1 << 17, "mlp_hidden": 1 << 20}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """A configuration found, and what had to be assumed for it."""

    encoder: EncoderConfig
    predictor: PredictorConfig | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Attention heads that the caller knows; None where they are to be found."""

    encoder: int | None = None
    predictor: int | None = None


def infer_sizes(encoder: Tensors, predictor: Tensors | None, heads: Heads, source: str) -> Sized:
    """Sizes of the networks that have these tensors.

    Args:
        encoder: Tensors by our names, without the network's own in front.
        predictor: The predictor's, if there is one.
        heads: What is known of the heads.
        source: What to call the source in messages.

    Raises:
        CheckpointError: Tensors that tell a size are missing, or the heads cannot be told.
    """
    notes: list[str] = []
    found = _encoder(encoder, heads.encoder, source, notes)
    guess = None
    if predictor is not None:
        guess = _predictor(predictor, heads.predictor, source, notes)
    return Sized(encoder=found, predictor=guess, notes=tuple(notes))


def canonical(config: EncoderConfig) -> EncoderConfig:
    """The same encoder by the name of its size, if it has one."""
    dims = config.dims
    named = _named(dims.width, dims.depth, dims.mlp_hidden, dims.heads)
    if named is None:
        return config
    plain = {"size": named, "width": None, "depth": None, "heads": None, "mlp_hidden": None}
    return config.model_copy(update=plain)


def expected_shapes(networks: Networks, *, teacher: bool = False) -> dict[str, Shape]:
    """Names and shapes of all weights of `networks`, `teacher.*` too if asked for.

    Raises:
        CheckpointError: A size is beyond all sense; building it would take for ever.
    """
    _check_sane(networks)
    encoder = new_encoder(networks).state_dict()
    parts = {"encoder": encoder, **({"teacher": encoder} if teacher else {})}
    if networks.predictor is not None:
        parts["predictor"] = new_predictor(networks).state_dict()
    return {f"{p}.{n}": tuple(t.shape) for p, state in parts.items() for n, t in state.items()}


def new_encoder(networks: Networks) -> Encoder:
    """The encoder without weights, on torch's meta device."""
    with torch.device("meta"):
        return Encoder(networks.encoder, attention=networks.attention)


def new_predictor(networks: Networks) -> Predictor:
    """The predictor without weights, on torch's meta device.

    Raises:
        CheckpointError: There is none.
    """
    if networks.predictor is None:
        raise CheckpointError("There is no predictor, only an encoder.")
    with torch.device("meta"):
        return Predictor(
            networks.predictor,
            encoder_width=networks.encoder.dims.width,
            attention=networks.attention,
            levels=max(1, len(networks.encoder.levels)),
        )


def _check_sane(networks: Networks) -> None:
    encoder, predictor = networks.encoder, networks.predictor
    sizes = {"patch size": encoder.patch_size, "tubelet size": encoder.tubelet_size}
    for name, dims in (("encoder", encoder.dims), ("predictor", predictor and predictor.dims)):
        if dims is not None:
            sizes |= {f"{name} {key}": getattr(dims, key) for key in _MOST}
    sizes |= {"mask tokens": predictor.num_mask_tokens} if predictor is not None else {}
    wrong = [f"{k} {v}" for k, v in sizes.items() if v > _MOST.get(k.partition(" ")[2], 1 << 14)]
    if wrong:
        raise CheckpointError(
            f"No network has these sizes: {', '.join(wrong)}.",
            remedy="Fetch the source again; it is damaged, or was made to do harm.",
        )


def _encoder(tensors: Tensors, heads: int | None, source: str, notes: list[str]) -> EncoderConfig:
    kernel = _shape(tensors, "patch_embed.proj.weight", source)
    if len(kernel) != 5 or kernel[1] != 3 or kernel[3] != kernel[4]:
        raise CheckpointError(
            f"{source}: expected a video patch embedding [width, 3, frames, pixels, pixels], "
            f"got {list(kernel)}.",
            remedy="Image models and patches that are not square cannot be imported.",
        )
    width, _, tubelet, patch, _ = kernel
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", source)[0]
    depth = _depth(tensors, r"blocks\.(\d+)\.")
    named = _named(width, depth, hidden, heads)
    if named is not None:
        dims = EncoderConfig(size=named).dims
        if heads is None:
            notes.append(f"{dims.heads} encoder heads, as {named} has")
        return EncoderConfig(size=named, patch_size=patch, tubelet_size=tubelet)
    if heads is None:
        heads = _heads_of_width(width, source)
        notes.append(f"{heads} encoder heads, as named sizes of width {width} have")
    return _valid(
        source,
        lambda: EncoderConfig(
            width=width,
            depth=depth,
            heads=heads,
            mlp_hidden=hidden,
            patch_size=patch,
            tubelet_size=tubelet,
        ),
    )


def _predictor(
    tensors: Tensors, heads: int | None, source: str, notes: list[str]
) -> PredictorConfig:
    width = _shape(tensors, "predictor_embed.weight", source)[0]
    hidden = _shape(tensors, "predictor_blocks.0.mlp.fc1.weight", source)[0]
    depth = _depth(tensors, r"predictor_blocks\.(\d+)\.")
    if heads is None:
        if width != _PREDICTOR_WIDTH:
            raise CheckpointError(
                f"{source}: a predictor of width {width} may have any number of heads; its "
                "tensors do not tell.",
                remedy="Give it with --predictor-heads.",
            )
        heads = _PREDICTOR_HEADS
        notes.append(f"{heads} predictor heads, as V-JEPA 2's predictors have")
    return _valid(
        source,
        lambda: PredictorConfig(
            width=width,
            depth=depth,
            heads=heads,
            mlp_hidden=None if hidden == 4 * width else hidden,
            num_mask_tokens=max(1, _mask_tokens(tensors)),
        ),
    )


def _mask_tokens(tensors: Tensors) -> int:
    if "mask_tokens" in tensors.shapes:
        return tensors.shapes["mask_tokens"][0]
    return sum(bool(re.fullmatch(r"mask_tokens\.\d+", name)) for name in tensors.shapes)


def _named(width: int, depth: int, hidden: int, heads: int | None) -> Size | None:
    """The named size of these numbers; of two that differ in heads alone the published one."""
    fitting: list[Size] = []
    for size in get_args(Size):
        dims = EncoderConfig(size=size).dims
        same = (dims.width, dims.depth, dims.mlp_hidden) == (width, depth, hidden)
        if same and heads in (None, dims.heads):
            fitting.append(size)
    # The xformers variants come last in their pairs, and are the ones that were released.
    return fitting[-1] if fitting else None


def _heads_of_width(width: int, source: str) -> int:
    known = {
        EncoderConfig(size=size).dims.width: EncoderConfig(size=size).dims.heads
        for size in get_args(Size)
    }
    if width in known:
        return known[width]
    raise CheckpointError(
        f"{source}: an encoder of width {width} may have any number of heads; its tensors do not "
        "tell.",
        remedy="Give it with --heads.",
    )


def _depth(tensors: Tensors, pattern: str) -> int:
    found = [match for name in tensors.shapes if (match := re.match(pattern, name))]
    return 1 + max(int(match[1]) for match in found) if found else 0


def _shape(tensors: Tensors, name: str, source: str) -> Shape:
    shape = tensors.shapes.get(name)
    if not shape:
        there = ", ".join(sorted(tensors.shapes)[:8]) or "nothing"
        raise CheckpointError(
            f"{source} holds no {name}; it has {there}, …",
            remedy="Only V-JEPA 2 and V-JEPA video encoders and predictors can be imported.",
        )
    return shape


def _valid(source: str, build: Callable[[], _Config]) -> _Config:
    try:
        return build()
    except ValidationError as error:
        reasons = "; ".join(detail["msg"] for detail in error.errors())
        raise CheckpointError(
            f"{source}: {reasons}", remedy="Check --heads and --predictor-heads."
        ) from None
