"""Our networks as a folder that transformers' `VJEPA2Model` (5.23) loads strictly.

transformers itself is not needed for it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.section import Section
from pipeline.data.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import CheckpointError
from pipeline.exchange.layout import NOT_IN_WEIGHTS, Networks
from pipeline.exchange.names import hf_recipe
from pipeline.exchange.tensors import write_safetensors
from pipeline.models.layers import NORM_EPS, ModelDims

CONFIG_FILE, PROCESSOR_FILE = "config.json", "video_preprocessor_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# A model with a head: its networks stand below the first word, its head below the others.
CLASSIFIER, BACKBONE, HEAD_PREFIXES = (
    "VJEPA2ForVideoClassification",
    "vjepa2",
    ("pooler.", "classifier."),
)
# What transformers would compute otherwise than jepa if it were anything else.
FIXED = {
    "model_type": "vjepa2",
    "in_chans": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": NORM_EPS,
    "qkv_bias": True,
}

_ENCODER_SIZES = frozenset(
    {"size", "width", "depth", "heads", "mlp_hidden", "patch_size", "tubelet_size"}
)
_PREDICTOR_SIZES = frozenset({"width", "depth", "heads", "mlp_hidden", "num_mask_tokens"})


def hf_config(networks: Networks, *, frames: int, resolution: int) -> dict[str, Any]:
    """The config.json that describes our networks.

    Raises:
        CheckpointError: transformers 5.23 cannot express them; every reason is named.
    """
    predictor = networks.predictor
    reasons = inexpressible(networks)
    if predictor is None or reasons:
        raise CheckpointError(
            "These networks cannot be said in transformers' VJEPA2Model: "
            + "; ".join([*reasons, *(["there is no predictor"] if predictor is None else [])])
            + ".",
            remedy="Export them with --format safetensors.",
        )
    networks.encoder.grid(frames, resolution)  # refuses clips that cannot be cut into whole tokens
    dims, narrow = networks.encoder.dims, predictor.dims
    return {
        "architectures": ["VJEPA2Model"],
        **FIXED,
        "patch_size": networks.encoder.patch_size,
        "tubelet_size": networks.encoder.tubelet_size,
        "crop_size": resolution,
        "frames_per_clip": frames,
        "hidden_size": dims.width,
        "num_hidden_layers": dims.depth,
        "num_attention_heads": dims.heads,
        "mlp_ratio": _ratio(dims),
        "drop_path_rate": 0.0,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "pred_hidden_size": narrow.width,
        "pred_num_hidden_layers": narrow.depth,
        "pred_num_attention_heads": narrow.heads,
        "pred_mlp_ratio": _ratio(narrow),
        "pred_num_mask_tokens": predictor.num_mask_tokens,
        "pred_zero_init_mask_tokens": True,
        "num_pooler_layers": 3,
    }


def inexpressible(networks: Networks) -> list[str]:
    """What of our networks transformers 5.23 has no words for.

    Sizes it has. Whatever else a section may be set to, now or in later versions of jepa, it can
    only have as jepa has it by default.
    """
    return [
        *_unusual("encoder", networks.encoder, _ENCODER_SIZES),
        *_unusual("attention", networks.attention, frozenset()),
        *(
            _unusual("predictor", networks.predictor, _PREDICTOR_SIZES)
            if networks.predictor is not None
            else []
        ),
    ]


def write_hf(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    head: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Writes config, weights and video processor.

    Args:
        folder: An existing folder.
        config: Content of config.json.
        tensors: `encoder.*` and `predictor.*`.
        head: A classifier's tensors by transformers' names; the networks then stand a level deeper.
    """
    named = _hf_tensors(tensors)
    if head is not None:
        named = chain(((f"{BACKBONE}.{name}", tensor) for name, tensor in named), head)
    home = write_safetensors(folder, "model", named)
    if len(set(home.values())) > 1:
        total = sum((folder / name).stat().st_size for name in set(home.values()))
        index = {"metadata": {"total_size": total}, "weight_map": home}
        _write_json(folder / WEIGHTS_INDEX, index)
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / PROCESSOR_FILE, processor_config(int(config["crop_size"])))


def processor_config(resolution: int) -> dict[str, Any]:
    """What `AutoVideoProcessor` does to a clip: the one view of jepa's evaluation."""
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "crop_size": {"height": resolution, "width": resolution},
        "size": {"shortest_edge": int(resolution * 256 / 224)},
        "resample": 2,  # bilinear
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _unusual(name: str, section: Section, expressible: frozenset[str]) -> list[str]:
    reasons = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key not in expressible | NOT_IN_WEIGHTS and value != field.get_default(
            call_default_factory=True
        ):
            reasons.append(f"{name}.{key} is {value}")
    return reasons


def _hf_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield from hf_recipe(name, tuple(tensor.shape)).split(tensor)


def _ratio(dims: ModelDims) -> float:
    """A ratio from which transformers computes exactly our hidden width, rounding down."""
    ratio = dims.mlp_hidden / dims.width
    while int(dims.width * ratio) < dims.mlp_hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
