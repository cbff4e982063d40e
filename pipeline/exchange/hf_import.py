"""Folders of transformers' `VJEPA2Model` (5.23), read strictly and without transformers."""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, UsageError
from pipeline.exchange.hf_export import (
    BACKBONE,
    CLASSIFIER,
    CONFIG_FILE,
    FIXED,
    HEAD_PREFIXES,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from pipeline.exchange.layout import Networks
from pipeline.exchange.names import hf_recipe, translate
from pipeline.exchange.sizes import canonical, expected_shapes
from pipeline.exchange.source import ImportOptions, Source
from pipeline.exchange.tensors import Tensors, joined, open_safetensors, read_json
from pipeline.files import sha256_of
from pipeline.models.encoder import EncoderConfig
from pipeline.models.predictor import PredictorConfig

_FILE = re.compile(r"[^/\\\0]+\.safetensors")
# transformers' own defaults, for what a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    **FIXED,
    "patch_size": 16,
    "tubelet_size": 2,
    "crop_size": 256,
    "frames_per_clip": 64,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4.0,
    "pred_hidden_size": 384,
    "pred_num_hidden_layers": 12,
    "pred_num_attention_heads": 12,
    "pred_mlp_ratio": 4.0,
    "pred_num_mask_tokens": 10,
}


def is_hf(path: Path) -> bool:
    """Whether a path is a folder of transformers with safetensors weights."""
    has_weights = (path / WEIGHTS).is_file() or (path / WEIGHTS_INDEX).is_file()
    return has_weights and (path / CONFIG_FILE).is_file()


def read_hf(folder: Path, options: ImportOptions, *, digest: bool = True) -> Source:
    """Networks of a `VJEPA2Model` folder: the config names all sizes, the weights must have them.

    Args:
        folder: With config.json and safetensors, in one file or several with an index.
        options: Clip size, if it is not the config's; heads are the config's.
        digest: Also read every byte for the digest that tells where networks are from.

    Raises:
        UsageError: It is no folder, or is to have positions that transformers lacks.
        CheckpointError: The folder is no such model, or is not whole; every reason is named.
    """
    if not folder.is_dir():
        raise UsageError(
            f"expected a folder of transformers, found none at {folder}",
            remedy="Give the folder with config.json; a .pt file is read with --format vjepa2.",
        )
    if options.positions != "rope":
        raise UsageError(f"transformers' VJEPA2Model is always rotary, not {options.positions}")
    config = read_json(folder / CONFIG_FILE)
    networks = _networks_of(config, folder, options)
    files = weight_files(folder)
    theirs, notes = _without_head(open_safetensors(files), config)
    tensors = translate(theirs, expected_shapes(networks), hf_recipe, str(folder))
    told: dict[str, Any] = {"format": "hf", "source": str(folder)}
    if digest:
        digests = {path.name: sha256_of(path) for path in (folder / CONFIG_FILE, *files)}
        whole = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        told |= {"sha256": whole, "files": digests}
    return Source(
        networks=networks,
        tensors=tensors,
        provenance=told,
        notes=("the folder holds one encoder: it serves as student and as teacher", *notes),
    )


def _without_head(theirs: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, tuple[str, ...]]:
    """The networks of a model with a classifier, which stand a level deeper there."""
    if config.get("architectures") != [CLASSIFIER]:
        return theirs, ()
    networks = theirs.below(f"{BACKBONE}.")
    others = {n: s for n, s in theirs.shapes.items() if not n.startswith(f"{BACKBONE}.")}
    strange = {n: s for n, s in others.items() if not n.startswith(HEAD_PREFIXES)}
    # Names that belong neither to the networks nor to the head are refused with the others.
    whole = joined(networks, Tensors(shapes=strange, read=theirs.read))
    return whole, ("its head is left out here; `jepa probe --given-head` takes it",)


def _networks_of(config: Mapping[str, Any], folder: Path, options: ImportOptions) -> Networks:
    whole = {**_DEFAULTS, **config}
    patch = whole["patch_size"]
    if isinstance(patch, list) and patch and patch == patch[:1] * len(patch):
        whole["patch_size"] = patch[0]
    wrong = [
        f"{key} is {config.get(key)!r}, expected {value!r}"
        for key, value in FIXED.items()
        if (config.get(key) if key == "model_type" else whole[key]) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is not of a model that jepa has: {'; '.join(wrong)}.",
            remedy="Give the folder of a VJEPA2Model.",
        )
    try:
        narrow = whole["pred_hidden_size"]
        narrow_hidden = int(narrow * whole["pred_mlp_ratio"])
        return Networks(
            encoder=canonical(
                EncoderConfig(
                    width=whole["hidden_size"],
                    depth=whole["num_hidden_layers"],
                    heads=whole["num_attention_heads"],
                    mlp_hidden=int(whole["hidden_size"] * whole["mlp_ratio"]),
                    patch_size=whole["patch_size"],
                    tubelet_size=whole["tubelet_size"],
                )
            ),
            predictor=PredictorConfig(
                width=narrow,
                depth=whole["pred_num_hidden_layers"],
                heads=whole["pred_num_attention_heads"],
                mlp_hidden=None if narrow_hidden == 4 * narrow else narrow_hidden,
                num_mask_tokens=whole["pred_num_mask_tokens"],
            ),
            frames=options.frames or whole["frames_per_clip"],
            resolution=options.resolution or whole["crop_size"],
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} holds sizes that cannot be built: {error}",
            remedy="Check the file against the model's own page.",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a folder, as its index names them.

    Raises:
        CheckpointError: The index names files elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    home = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    names: list[Any] = list(home.values()) if isinstance(home, dict) else [None]
    # A name with a slash in it would read files outside the folder.
    strange = [name for name in names if not isinstance(name, str) or not _FILE.fullmatch(name)]
    if strange:
        raise CheckpointError(
            f"{folder / WEIGHTS_INDEX}: expected names of files in the folder, got {strange[:5]}.",
            remedy="Fetch the folder again from a source that you trust.",
        )
    return [folder / name for name in sorted(set(names))]
