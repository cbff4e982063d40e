"""Checkpoints of the official repositories: pickles, read with torch's restricted reader alone."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.exchange.layout import Networks
from pipeline.exchange.names import official_recipe, translate
from pipeline.exchange.sizes import expected_shapes, infer_sizes
from pipeline.exchange.source import ImportOptions, Source
from pipeline.exchange.tensors import Tensors, joined, of_dict
from pipeline.files import sha256_of

# DDP, the multi-mask wrapper and torch.compile each put a word in front.
_WRAPPERS = re.compile(r"^(?:(?:module|backbone|_orig_mod)\.)+")
_NETWORKS = ("encoder", "target_encoder", "predictor")
_POSITION_TABLES = ("pos_embed", "predictor_pos_embed")


def read_official(path: Path, options: ImportOptions) -> Source:
    """Networks of an official checkpoint; its optimiser's state is not read.

    Args:
        path: A .pt file with `encoder`, `target_encoder` and `predictor`, or some of them.
        options: What the file does not tell.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It holds more than tensors and plain values, or no networks known here.
    """
    content = _load(path)
    parts, notes = _networks(content, path)
    encoder, teacher = parts.get("encoder"), parts.get("target_encoder")
    role = "student"
    if encoder is None:
        encoder, teacher, role = teacher, None, "teacher"
    if encoder is None:
        raise CheckpointError(
            f"{path} holds neither `encoder` nor `target_encoder`; it has {_keys(content)}.",
            remedy="Give a checkpoint of V-JEPA 2's or V-JEPA's pretraining.",
        )
    predictor = parts.get("predictor")
    sized = infer_sizes(encoder, predictor, options.heads, str(path))
    networks = Networks(
        encoder=sized.encoder,
        predictor=sized.predictor,
        encoder_is=role,
        frames=options.frames,
        resolution=options.resolution,
    )
    found = [encoder.above("encoder.")]
    found += [] if teacher is None else [teacher.above("teacher.")]
    found += [] if predictor is None else [predictor.above("predictor.")]
    expected = expected_shapes(networks, teacher=teacher is not None)
    return Source(
        networks=networks,
        tensors=translate(joined(*found), expected, official_recipe, str(path)),
        provenance={"format": "vjepa2", "source": str(path), "sha256": sha256_of(path)},
        notes=(*notes, *sized.notes),
    )


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UsageError(
            f"expected the file of an official checkpoint, found none at {path}",
            remedy="Give the .pt file; a folder of transformers is read with --format hf.",
        )
    try:
        try:
            # Mapped: a tensor is in memory when it is copied, the optimiser's state never.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and reading that "
            f"could run code of whoever wrote it ({_first_sentence(error)}).",
            remedy="Take the file from its authors, or have it saved again as tensors alone.",
        ) from None
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint that torch can read: {_first_sentence(error)}",
            remedy="Fetch the file again; it may be cut short.",
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected networks by name, got a {type(content).__name__}.")
    return content


def _networks(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensors], list[str]]:
    parts, notes = {}, []
    others = [str(key) for key in content if key not in _NETWORKS]
    strange = [key for key in others if key != "opt" and _holds_tensors(content[key])]
    if strange:
        raise CheckpointError(
            f"{path} holds tensors under names that no official checkpoint has: "
            f"{', '.join(strange)}; expected {', '.join(_NETWORKS)}.",
            remedy="Rename or remove them, if you know what they are.",
        )
    if others:
        notes.append(f"not taken over: {', '.join(others)} (training starts afresh from weights)")
    for key in _NETWORKS:
        if key in content:
            tensors, dropped = _cleaned(content[key], f"{path}, {key}")
            parts[key] = of_dict(tensors)
            notes += [f"{key}: {name} is not used, positions are rotary" for name in dropped]
    return parts, notes


def _cleaned(state: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source}: expected tensors by name, got {type(state).__name__}.")
    tensors, dropped = {}, []
    for key, tensor in state.items():
        name = _WRAPPERS.sub("", str(key))
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_sparse:
            raise CheckpointError(f"{source}: {key} is no dense tensor of floating numbers.")
        if name in tensors:
            raise CheckpointError(f"{source} holds {name} twice, with other words in front.")
        if name in _POSITION_TABLES:
            dropped.append(name)
        else:
            tensors[name] = tensor
    return tensors, dropped


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(str(key) for key in list(content)[:10]) or "nothing"


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    told = next((line.strip() for line in text if "Unsupported" in line), text[0])
    return told[:200]
