"""Attentive heads by themselves: ours, those of transformers' folders, and official probe files."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError, StorageError, UsageError
from pipeline.exchange.hf_export import CLASSIFIER, HEAD_PREFIXES
from pipeline.exchange.hf_import import is_hf, weight_files
from pipeline.exchange.layout import Networks
from pipeline.exchange.names import Recipe, hf_head_recipe
from pipeline.exchange.official import load_pickle
from pipeline.exchange.tensors import open_safetensors, read_json
from pipeline.files import write_atomically
from pipeline.models.attentive import PROBE_EPS, AttentiveProbe

_BLOCK = re.compile(r"pooler\.blocks\.(\d+)\.")
# DDP and torch.compile each put a word in front.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_KEY = "jepa_head"
# The published probes of every size; their files do not tell.
_PUBLISHED_HEADS = 16
# Left over from V-JEPA 1's cross-attention, computed by nobody.
_UNUSED = "pooler.cross_attention_block.xattn.proj."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadWeights:
    """An attentive head by the names of `AttentiveProbe`."""

    tensors: Mapping[str, Tensor]
    num_heads: int
    norm_eps: float
    class_names: tuple[str, ...]
    provenance: Mapping[str, Any]
    """Where it is from, and what it was fitted on."""

    @property
    def width(self) -> int:
        """Width of the tokens it takes."""
        return self.tensors["linear.weight"].shape[1]

    @property
    def num_classes(self) -> int:
        """Classes it tells apart."""
        return self.tensors["linear.weight"].shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks in all, the cross-attention among them."""
        found = [match[1] for name in self.tensors if (match := _BLOCK.match(name))]
        return 1 + len(set(found))

    def build(self) -> AttentiveProbe:
        """The head, in evaluation mode.

        Raises:
            CheckpointError: Its tensors are not those of an attentive probe of its size.
        """
        with torch.device("meta"):
            probe = AttentiveProbe(
                width=self.width,
                num_classes=self.num_classes,
                num_heads=self.num_heads,
                num_blocks=self.num_blocks,
                norm_eps=self.norm_eps,
            )
        state = {name: tensor.float() for name, tensor in self.tensors.items()}
        try:
            probe.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            told = " ".join(str(error).split())
            raise CheckpointError(f"this is no attentive head that jepa has: {told}") from error
        return probe.eval().requires_grad_(False)


def read_head(path: Path) -> HeadWeights:
    """An attentive head from wherever it is.

    Args:
        path: A file that `jepa probe --save-head` wrote, a folder of transformers'
            VJEPA2ForVideoClassification, or an official probe's .pt file.

    Raises:
        UsageError: There is nothing of the kind.
        CheckpointError: It is damaged, or no attentive head.
    """
    if path.is_dir() and is_hf(path):
        return _of_hf(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _of_file(path)
    if path.is_file():
        return _of_official(path)
    raise UsageError(
        f"expected an attentive head at {path}, found none",
        remedy="Give a file of `jepa probe --save-head`, a folder of transformers' "
        "VJEPA2ForVideoClassification, or an official probe's .pt file.",
    )


def write_head(path: Path, head: HeadWeights) -> None:
    """Writes a head with what it was fitted on.

    Raises:
        StorageError: It cannot be written.
    """
    told = {
        "num_heads": head.num_heads,
        "norm_eps": head.norm_eps,
        "class_names": list(head.class_names),
        "provenance": dict(head.provenance),
    }
    tensors = {name: tensor.contiguous() for name, tensor in head.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {_KEY: json.dumps(told)}))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def hf_head_tensors(head: HeadWeights) -> Iterator[tuple[str, Tensor]]:
    """A head's tensors by transformers' names."""
    for name, tensor in head.tensors.items():
        yield from hf_head_recipe(name).split(tensor)


def hf_head_config(head: HeadWeights, networks: Networks) -> dict[str, Any]:
    """What config.json says of a head.

    Raises:
        CheckpointError: transformers computes heads otherwise; every reason is named.
    """
    dims = networks.encoder.dims
    rules = (
        (head.width == dims.width, f"it takes tokens of width {head.width}, not {dims.width}"),
        (
            head.num_heads == dims.heads,
            f"it has {head.num_heads} attention heads, where transformers takes the encoder's "
            f"{dims.heads}",
        ),
        (
            4 * dims.width == dims.mlp_hidden,
            f"its MLPs are {4 * dims.width} wide, where transformers takes the encoder's "
            f"{dims.mlp_hidden}",
        ),
    )
    reasons = [reason for holds, reason in rules if not holds]
    if reasons:
        raise CheckpointError(
            f"this head cannot be said in transformers' {CLASSIFIER}: {'; '.join(reasons)}.",
            remedy=f"Fit one with attentive.attention_heads={dims.heads}.",
        )
    return {
        "architectures": [CLASSIFIER],
        "num_pooler_layers": head.num_blocks - 1,
        "id2label": {str(number): name for number, name in enumerate(head.class_names)},
        "label2id": {name: number for number, name in enumerate(head.class_names)},
    }


def _of_file(path: Path) -> HeadWeights:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return HeadWeights(
            tensors=tensors,
            num_heads=int(told["num_heads"]),
            norm_eps=float(told["norm_eps"]),
            class_names=tuple(str(name) for name in told["class_names"]),
            provenance=told["provenance"],
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no head that jepa wrote: {type(error).__name__} {error}",
            remedy="Give a file of `jepa probe --save-head`.",
        ) from error


def _of_hf(folder: Path) -> HeadWeights:
    """The head of a classification model; its norms are computed with the encoder's epsilon."""
    config = read_json(folder / "config.json")
    theirs = open_safetensors(weight_files(folder))
    found = {name: shape for name, shape in theirs.shapes.items() if name.startswith(HEAD_PREFIXES)}
    if not found:
        raise UsageError(
            f"{folder} holds no head: it is a model without one",
            remedy="Give the folder of a VJEPA2ForVideoClassification.",
        )
    num_blocks = 1 + int(config.get("num_pooler_layers", 3))
    recipes = _recipes(num_blocks)
    missing = [part for recipe in recipes.values() for part in recipe.parts if part not in found]
    if missing:
        raise CheckpointError(f"{folder}: the head lacks {', '.join(missing[:10])}.")
    names = config.get("id2label") or {}
    num_classes = found["classifier.weight"][0]
    return HeadWeights(
        tensors={name: recipe.join(theirs.read) for name, recipe in recipes.items()},
        num_heads=int(config.get("num_attention_heads", 16)),
        norm_eps=float(config.get("layer_norm_eps", 1e-6)),
        class_names=tuple(str(names.get(str(n), n)) for n in range(num_classes)),
        provenance={"format": "hf", "source": str(folder)},
    )


def _recipes(num_blocks: int) -> dict[str, Recipe]:
    with torch.device("meta"):
        names = AttentiveProbe(width=16, num_classes=2, num_heads=2, num_blocks=num_blocks)
    return {name: hf_head_recipe(name) for name in names.state_dict()}


def _of_official(path: Path) -> HeadWeights:
    """The first of an official probe's classifiers; released files hold the best one alone."""
    content = load_pickle(path)
    heads = content.get("classifiers")
    if not isinstance(heads, list) or not heads or not isinstance(heads[0], Mapping):
        raise CheckpointError(
            f"{path} holds no list `classifiers`; it has {', '.join(map(str, content))}.",
            remedy="Give an official probe's file, such as ssv2-vitl-16x2x3.pt.",
        )
    tensors = {_WRAPPERS.sub("", str(name)): tensor for name, tensor in heads[0].items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)}
    if "linear.weight" not in kept:
        raise CheckpointError(f"{path}: its classifier is no attentive head with one linear layer.")
    width = kept["linear.weight"].shape[1]
    if width % _PUBLISHED_HEADS:
        raise ConfigError(f"{path}: its width {width} does not divide into 16 attention heads.")
    num_classes = kept["linear.weight"].shape[0]
    return HeadWeights(
        tensors=kept,
        num_heads=_PUBLISHED_HEADS,
        norm_eps=PROBE_EPS,
        class_names=tuple(str(number) for number in range(num_classes)),
        provenance={"format": "vjepa2", "source": str(path), "of": len(heads)},
    )
