"""One parameter, three names: in jepa, in official checkpoints, in transformers.

jepa's names are the official ones. Official checkpoints keep mask tokens as a list, transformers
cuts the fused [q | k | v] projection into its thirds; everything else is a change of words.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.exchange.tensors import Shape, Tensors

_BLOCK = re.compile(r"(predictor_)?blocks\.(\d+)\.(.+)")
_THIRDS = ("query", "key", "value")
_FUSED = (
    (".attn.qkv", ".self_attn", "qkv"),
    (".xattn.q", ".cross_attn", "q"),
    (".xattn.kv", ".cross_attn", "kv"),
)
_HF_PLAIN = {
    "encoder.patch_embed.proj": "encoder.embeddings.patch_embeddings.proj",
    "encoder.norm": "encoder.layernorm",
    "predictor.predictor_embed": "predictor.embeddings.predictor_embeddings",
    "predictor.predictor_norm": "predictor.layernorm",
    "predictor.predictor_proj": "predictor.proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one tensor of ours is put together from others', or cut into them."""

    parts: tuple[str, ...]
    """Their names."""
    how: Literal["same", "cat", "stack"] = "same"
    """`cat` joins along the first dimension, `stack` makes a new first one."""

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor from theirs."""
        if self.how == "same":
            return read(self.parts[0])
        tensors = [read(name) for name in self.parts]
        return torch.cat(tensors) if self.how == "cat" else torch.stack(tensors)

    def split(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Their tensors, by name, from ours."""
        if self.how == "same":
            return [(self.parts[0], tensor)]
        pieces = tensor.chunk(len(self.parts)) if self.how == "cat" else tensor.unbind()
        return list(zip(self.parts, pieces, strict=True))

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape | None:
        """Shape of our tensor; None if theirs do not fit together."""
        theirs = [shapes[name] for name in self.parts]
        if len(set(theirs)) > 1:
            return None
        if self.how == "same":
            return theirs[0]
        if self.how == "stack":
            return (len(theirs), *theirs[0])
        return (len(theirs) * theirs[0][0], *theirs[0][1:]) if theirs[0] else None


def hf_recipe(name: str, shape: Shape) -> Recipe:  # noqa: ARG001 - the type of all recipes
    """From transformers' VJEPA2Model; `name` begins with `encoder.` or `predictor.`."""
    network, _, rest = name.partition(".")
    if name == "predictor.mask_tokens":
        return Recipe(parts=("predictor.embeddings.mask_tokens",))
    block = _BLOCK.fullmatch(rest)
    if block is None:
        module, _, leaf = name.rpartition(".")
        return Recipe(parts=(f"{_HF_PLAIN[module]}.{leaf}",))
    inside = f"{network}.layer.{block[2]}"
    if block[3].startswith("attn.qkv."):
        leaf = block[3].rpartition(".")[2]
        thirds = tuple(f"{inside}.attention.{third}.{leaf}" for third in _THIRDS)
        return Recipe(parts=thirds, how="cat")
    return Recipe(parts=(f"{inside}.{block[3].replace('attn.', 'attention.')}",))


def hf_head_recipe(name: str) -> Recipe:
    """From transformers' VJEPA2ForVideoClassification; `name` is one of `AttentiveProbe`'s."""
    if name.startswith("linear."):
        return Recipe(parts=(name.replace("linear.", "classifier.", 1),))
    if name == "pooler.query_tokens":
        return Recipe(parts=(name,))
    module, _, leaf = name.rpartition(".")
    module = module.replace("pooler.blocks.", "pooler.self_attention_layers.")
    module = module.replace("cross_attention_block", "cross_attention_layer")
    module = re.sub(r"\.norm([12])$", r".layer_norm\1", module)
    for fused, place, words in _FUSED:
        if module.endswith(fused):
            inside = module.removesuffix(fused) + place
            parts = tuple(f"{inside}.{word}_proj.{leaf}" for word in words)
            return Recipe(parts=parts, how="cat" if len(parts) > 1 else "same")
    module = module.replace(".attn.proj", ".self_attn.out_proj")
    return Recipe(parts=(f"{module}.{leaf}",))


def official_recipe(name: str, shape: Shape) -> Recipe:
    """From an official checkpoint's cleaned names, the network's name in front as in ours."""
    if name == "predictor.mask_tokens":
        return Recipe(parts=tuple(f"{name}.{number}" for number in range(shape[0])), how="stack")
    return Recipe(parts=(name,))


RecipeOf = Callable[[str, Shape], Recipe]


def translate(
    theirs: Tensors, expected: Mapping[str, Shape], recipe_of: RecipeOf, source: str
) -> Tensors:
    """Our tensors out of theirs, read when they are asked for.

    Args:
        theirs: Everything that is to be taken over.
        expected: Names and shapes that our networks have.
        recipe_of: How ours are made of theirs.
        source: What to call the source in messages.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape; all of them are named.
    """
    recipes = {name: recipe_of(name, shape) for name, shape in expected.items()}
    wanted = [part for recipe in recipes.values() for part in recipe.parts]
    missing = [part for part in wanted if part not in theirs.shapes]
    unknown = sorted(set(theirs.shapes) - set(wanted))
    wrong = []
    for name, recipe in recipes.items():
        if not set(recipe.parts) & set(missing):
            found = recipe.joined_shape(theirs.shapes)
            if found != expected[name]:
                got = ", ".join(str(theirs.shapes[part]) for part in recipe.parts)
                wrong.append(f"{recipe.parts[0]}: expected {expected[name]} in all, got {got}")
    refuse_misfits(source, missing=missing, unknown=unknown, wrong=wrong)
    return Tensors(shapes=dict(expected), read=lambda name: recipes[name].join(theirs.read))


def refuse_misfits(
    source: str, *, missing: list[str], unknown: list[str], wrong: list[str]
) -> None:
    """Names everything that does not fit, at once.

    Raises:
        CheckpointError: Anything was given.
    """
    lines = [
        *_listed("missing", missing),
        *_listed("not known here", unknown),
        *_listed("of another shape", wrong),
    ]
    if not lines:
        return
    raise CheckpointError(
        f"{source} does not fit.\n  " + "\n  ".join(lines),
        remedy=_why(unknown) or "Give the sizes that it was trained with.",
    )


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = names[:_MAX_SHOWN]
    more = [f"… and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    return [f"{len(names)} {what}:", *(f"  {name}" for name in (*shown, *more))]


_MAX_SHOWN = 40
# What a name that jepa has no place for tells about the model it is from.
_SIGNS = {
    r"mlp\.(fc3|w12|w3|up_proj)\.": "Its MLPs are SwiGLU, which neither jepa's networks nor "
    "transformers' have: it cannot be imported.",
    r"(norms_block|img_mod_embed|video_mod_embed|patch_embed_img|modality)": "These belong to "
    "V-JEPA 2.1 (levels, modalities): only V-JEPA 2 and V-JEPA are read.",
    r"(action_encoder|state_encoder|extrinsics_encoder)": "This is the action-conditioned "
    "predictor: jepa has none. Take a checkpoint of the pretraining.",
    r"(pooler|classifier|query_tokens)": "It holds a probe's head: take the folder of the "
    "pretrained model, or its part named `vjepa2`.",
    r"(cls_token|reg_token|register)": "Class and register tokens have no place in jepa's encoder.",
}


def _why(unknown: list[str]) -> str | None:
    for pattern, reason in _SIGNS.items():
        if any(re.search(pattern, name) for name in unknown):
            return reason
    return None
