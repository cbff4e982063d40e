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
from pipeline.exchange.sizes import Heads, expected_shapes, infer_sizes
from pipeline.exchange.source import ImportOptions, Source
from pipeline.exchange.tables import read_table
from pipeline.exchange.tensors import Tensors, joined, of_dict
from pipeline.files import sha256_of
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import EncoderConfig

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
    content = load_pickle(path)
    parts, tables = _networks(content, path)
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
    sized = infer_sizes(encoder, predictor, _heads(options, encoder), str(path))
    networks = Networks(
        encoder=sized.encoder,
        predictor=sized.predictor,
        attention=_attention(tables, options, path),
        encoder_is=role,
        **_clip(tables, options, sized.encoder),
    )
    found = [encoder.above("encoder.")]
    found += [] if teacher is None else [teacher.above("teacher.")]
    found += [] if predictor is None else [predictor.above("predictor.")]
    expected = expected_shapes(networks, teacher=teacher is not None)
    return Source(
        networks=networks,
        tensors=translate(joined(*found), expected, official_recipe, str(path)),
        provenance={"format": "vjepa2", "source": str(path), "sha256": sha256_of(path)},
        notes=(*_left_out(content), *_told_of(tables, networks), *sized.notes),
    )


def load_pickle(path: Path) -> Mapping[str, Any]:
    """The content of an official file, read without running anything that stands in it.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It holds more than tensors and plain values, or is damaged.
    """
    if not path.is_file():
        raise UsageError(
            f"expected the file of an official checkpoint, found none at {path}",
            remedy="Give the .pt file; a folder of transformers is read with --format hf.",
        )
    _must_be_saved_by_torch(path)
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


def _must_be_saved_by_torch(path: Path) -> None:
    """Else torch calls whatever it meets in a text or a video a pickle that could run code."""
    try:
        with path.open("rb") as file:
            beginning = file.read(2)
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}") from error
    if beginning != b"PK" and not beginning.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is no checkpoint that torch can read: expected a zip or a pickle, got "
            f"{'an empty file' if not beginning else f'a file that begins with {beginning!r}'}.",
            remedy="Fetch the file again; it may be cut short.",
        )


def _networks(
    content: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensors], dict[str, Tensor]]:
    """Tensors of each network by clean names, and their position tables."""
    parts, tables = {}, {}
    others = [str(key) for key in content if key not in _NETWORKS]
    strange = [key for key in others if key != "opt" and _holds_tensors(content[key])]
    if strange:
        raise CheckpointError(
            f"{path} holds tensors under names that no official checkpoint has: "
            f"{', '.join(strange)}; expected {', '.join(_NETWORKS)}.",
            remedy="Rename or remove them, if you know what they are.",
        )
    for key in _NETWORKS:
        if key in content:
            tensors = _cleaned(content[key], f"{path}, {key}")
            found = {name: tensors.pop(name) for name in _POSITION_TABLES if name in tensors}
            tables |= {f"{key}.{name}": table for name, table in found.items()}
            parts[key] = of_dict(tensors)
    return parts, tables


def _left_out(content: Mapping[str, Any]) -> list[str]:
    others = [str(key) for key in content if key not in _NETWORKS]
    return [f"not taken over: {', '.join(others)}; training starts afresh"] if others else []


def _told_of(tables: Mapping[str, Tensor], networks: Networks) -> list[str]:
    if networks.attention.positions == "sincos":
        return [f"{name}: computed anew for every clip, the table is equal" for name in tables]
    return [
        f"{name} is left out: positions are rotary (V-JEPA 1 needs --positions sincos)"
        for name in tables
    ]


def _heads(options: ImportOptions, encoder: Tensors) -> Heads:
    """V-JEPA 1's predictors have as many heads as their encoders."""
    if options.positions == "rope" or options.heads.predictor is not None:
        return options.heads
    found = infer_sizes(encoder, None, options.heads, "the encoder").encoder
    return Heads(encoder=options.heads.encoder, predictor=found.dims.heads)


def _attention(tables: Mapping[str, Tensor], options: ImportOptions, path: Path) -> AttentionConfig:
    if options.positions == "rope":
        return AttentionConfig()
    found = {name: read_table(table) for name, table in tables.items()}
    kinds = {facts.uniform_power for facts in found.values() if facts is not None}
    strange = [name for name, facts in found.items() if facts is None]
    if strange or len(kinds) != 1:
        what = ", ".join(strange) or "none"
        raise CheckpointError(
            f"{path}: expected position tables of sines and cosines, all made alike; these are "
            f"others: {what}.",
            remedy="Import it with --positions rope, if its positions are rotary.",
        )
    return AttentionConfig(positions="sincos", uniform_power=kinds.pop())


def _clip(
    tables: Mapping[str, Tensor], options: ImportOptions, encoder: EncoderConfig
) -> dict[str, int | None]:
    """Clip size: as given, or as a position table tells it."""
    told = {"frames": options.frames, "resolution": options.resolution}
    facts = next((found for table in tables.values() if (found := read_table(table))), None)
    if facts is not None:
        told["frames"] = told["frames"] or facts.grid.t * encoder.tubelet_size
        told["resolution"] = told["resolution"] or facts.grid.h * encoder.patch_size
    return told


def _cleaned(state: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source}: expected tensors by name, got {type(state).__name__}.")
    tensors = {}
    for key, tensor in state.items():
        name = _WRAPPERS.sub("", str(key))
        if not _dense_floating(tensor):
            raise CheckpointError(f"{source}: {key} is no dense tensor of floating numbers.")
        if name in tensors:
            raise CheckpointError(f"{source} holds {name} twice, with other words in front.")
        tensors[name] = tensor
    return tensors


def _dense_floating(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    return value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(str(key) for key in list(content)[:10]) or "nothing"


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    told = next((line.strip() for line in text if "Unsupported" in line), text[0])
    return told[:200]
