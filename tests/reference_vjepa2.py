"""V-JEPA 2's training step in plain PyTorch, transcribed from its formulas (arXiv 2506.09985).

Nothing of `pipeline` is used here, and no layer or optimiser of torch's either: matrix products,
means and elementwise functions of named weights. Slow and small on purpose; it is what the real
step is compared with. Weights are a dict in the layout of the released checkpoints.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
PREFIX = "module.backbone."


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a network and of its tokens."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    tubelet: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int
    num_mask_tokens: int


def random_checkpoint(sizes: Sizes, seed: int) -> dict[str, Weights]:
    """`encoder`, `predictor` and `target_encoder`, every weight drawn, norms and biases too.

    Mask tokens beyond the first are zero, as in the released checkpoints: they are never used.
    """
    draw = torch.Generator().manual_seed(seed)
    encoder = _random(_encoder_shapes(sizes), draw)
    predictor = _random(_predictor_shapes(sizes), draw)
    for number in range(1, sizes.num_mask_tokens):
        predictor[f"{PREFIX}mask_tokens.{number}"].zero_()
    return {
        "encoder": encoder,
        "predictor": predictor,
        "target_encoder": {name: weight.clone() for name, weight in encoder.items()},
    }


def _random(shapes: dict[str, tuple[int, ...]], draw: torch.Generator) -> Weights:
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw) * 0.05
        is_scale = "norm" in name and name.endswith("weight")
        weights[PREFIX + name] = values + 1.0 if is_scale else values
    return weights


def _block_shapes(stem: str, depth: int, width: int, mlp: int) -> Iterator[tuple[str, tuple]]:
    for layer in range(depth):
        at = f"{stem}.{layer}"
        for norm in ("norm1", "norm2"):
            yield f"{at}.{norm}.weight", (width,)
            yield f"{at}.{norm}.bias", (width,)
        for name, num_out, num_in in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            yield f"{at}.{name}.weight", (num_out, num_in)
            yield f"{at}.{name}.bias", (num_out,)


def _encoder_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    return {
        "patch_embed.proj.weight": (s.width, 3, s.tubelet, s.patch, s.patch),
        "patch_embed.proj.bias": (s.width,),
        **dict(_block_shapes("blocks", s.depth, s.width, s.mlp)),
        "norm.weight": (s.width,),
        "norm.bias": (s.width,),
    }


def _predictor_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    narrow = s.predictor_width
    tokens = {f"mask_tokens.{n}": (1, 1, narrow) for n in range(s.num_mask_tokens)}
    return {
        "predictor_embed.weight": (narrow, s.width),
        "predictor_embed.bias": (narrow,),
        **tokens,
        **dict(_block_shapes("predictor_blocks", s.predictor_depth, narrow, 4 * narrow)),
        "predictor_norm.weight": (narrow,),
        "predictor_norm.bias": (narrow,),
        "predictor_proj.weight": (s.width, narrow),
        "predictor_proj.bias": (s.width,),
    }


@dataclass(frozen=True, kw_only=True)
class Grid3:
    """Tokens along time, height and width."""

    t: int
    h: int
    w: int


def normalised_pixels(video_uint8: Tensor) -> Tensor:
    """(x − 255 µ) / (255 σ) with ImageNet's means and deviations, [B, 3, T, H, W]."""
    mean = 255 * torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1, 1)
    deviation = 255 * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1, 1)
    return (video_uint8.float() - mean) / deviation


def encode(weights: Weights, s: Sizes, video: Tensor, keep: Tensor | None = None) -> Tensor:
    """Features [B, K, D] of the kept tokens (all if None), each at the place of its index."""
    grid = Grid3(
        t=video.shape[2] // s.tubelet, h=video.shape[3] // s.patch, w=video.shape[4] // s.patch
    )
    x = _patches(video, s, grid) @ weights[f"{PREFIX}patch_embed.proj.weight"].flatten(1).T
    x = x + weights[f"{PREFIX}patch_embed.proj.bias"]
    index = torch.arange(x.shape[1]).expand(x.shape[0], -1) if keep is None else keep
    x = _take(x, index)
    for layer in range(s.depth):
        x = _block(weights, f"{PREFIX}blocks.{layer}", x, s.heads, index, grid)
    return _norm(x, weights, f"{PREFIX}norm")


def predict(
    weights: Weights, s: Sizes, context: Tensor, places: tuple[Tensor, Tensor], grid: Grid3
) -> Tensor:
    """Features [B, Kt, D] at the targets; `places` are the indices of contexts and targets."""
    context_index, target_index = places
    x = _linear(context, weights, f"{PREFIX}predictor_embed")
    query = weights[f"{PREFIX}mask_tokens.0"].expand(*target_index.shape, -1)
    x, index = torch.cat([x, query], 1), torch.cat([context_index, target_index], 1)
    order = index.argsort(dim=1)
    x, index = _take(x, order), index.gather(1, order)
    for layer in range(s.predictor_depth):
        x = _block(weights, f"{PREFIX}predictor_blocks.{layer}", x, s.predictor_heads, index, grid)
    x = _take(_norm(x, weights, f"{PREFIX}predictor_norm"), order.argsort(dim=1))
    return _linear(x[:, context_index.shape[1] :], weights, f"{PREFIX}predictor_proj")


def _patches(video: Tensor, s: Sizes, grid: Grid3) -> Tensor:
    """[B, N, 3 · tubelet · patch²]: what the kernel of one token covers, in the kernel's order."""
    cut = video.reshape(-1, 3, grid.t, s.tubelet, grid.h, s.patch, grid.w, s.patch)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def _block(weights: Weights, at: str, x: Tensor, heads: int, index: Tensor, grid: Grid3) -> Tensor:
    inner = _norm(x, weights, f"{at}.norm1")
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in _linear(inner, weights, f"{at}.attn.qkv").chunk(3, dim=-1)
    )
    q, k = _rotate(q, index, grid), _rotate(k, index, grid)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    mixed = (scores / scores.sum(-1, keepdim=True)) @ v
    x = x + _linear(mixed.transpose(1, 2).flatten(2), weights, f"{at}.attn.proj")
    hidden = _linear(_norm(x, weights, f"{at}.norm2"), weights, f"{at}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + _linear(hidden, weights, f"{at}.mlp.fc2")


def _rotate(x: Tensor, index: Tensor, grid: Grid3) -> Tensor:
    """[B, heads, N, d] turned by the places of its tokens: parts t, h, w and an untouched tail."""
    a = 2 * (x.shape[-1] // 3 // 2)
    t = index // (grid.h * grid.w)
    h = (index - t * grid.h * grid.w) // grid.w
    w = index % grid.w
    parts = [_turn(x[..., n * a : (n + 1) * a], place) for n, place in enumerate((t, h, w))]
    return torch.cat([*parts, x[..., 3 * a :]], dim=-1)


def _turn(x: Tensor, place: Tensor) -> Tensor:
    m = x.shape[-1] // 2
    omega = 10000.0 ** (-torch.arange(m, dtype=torch.float32) / m)
    angle = place[:, None, :, None] * torch.cat([omega, omega])
    even, odd = x[..., 0::2], x[..., 1::2]
    out_even = even * angle[..., 0::2].cos() - odd * angle[..., 0::2].sin()
    out_odd = odd * angle[..., 1::2].cos() + even * angle[..., 1::2].sin()
    return torch.stack([out_even, out_odd], dim=-1).flatten(-2)


def _linear(x: Tensor, weights: Weights, at: str) -> Tensor:
    return x @ weights[f"{at}.weight"].T + weights[f"{at}.bias"]


def _norm(x: Tensor, weights: Weights, at: str) -> Tensor:
    return _standardised(x, 1e-6) * weights[f"{at}.weight"] + weights[f"{at}.bias"]


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[places] for row, places in zip(x, index, strict=True)])


def masks_of_blocks(
    size: tuple[int, int, int], corners: list[list[tuple[int, int, int]]], grid: Grid3
) -> tuple[Tensor, Tensor]:
    """Context and target indices of a batch, cut to the shortest by keeping the lowest.

    Args:
        size: (t, h, w) of all blocks of the batch.
        corners: For each clip, (top, left, start) of each of its blocks.
        grid: Tokens of a clip.
    """
    t, h, w = size
    contexts, targets = [], []
    for clip in corners:
        keep = torch.ones(grid.t, grid.h, grid.w)
        for top, left, start in clip:
            keep[start : start + t, top : top + h, left : left + w] = 0
        contexts.append(keep.flatten().nonzero().flatten())
        targets.append((1 - keep.flatten()).nonzero().flatten())
    return tuple(
        torch.stack([one[: min(map(len, all_of_them))] for one in all_of_them])
        for all_of_them in (contexts, targets)
    )


def mask_loss(
    checkpoint: dict[str, Weights], s: Sizes, video: Tensor, masks: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and each mask's predictions: mean |z − h| of every mask, averaged over masks."""
    grid = Grid3(
        t=video.shape[2] // s.tubelet, h=video.shape[3] // s.patch, w=video.shape[4] // s.patch
    )
    with torch.no_grad():
        wanted = _standardised(encode(checkpoint["target_encoder"], s, video), 1e-5)
    losses, guesses = [], []
    for places in masks:
        context = encode(checkpoint["encoder"], s, video, places[0])
        guess = predict(checkpoint["predictor"], s, context, places, grid)
        losses.append((guess - _take(wanted, places[1])).abs().mean())
        guesses.append(guess)
    return sum(losses) / len(losses), guesses


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Schedules as functions of the 1-based step."""

    learning_rate: Callable[[int], float]
    weight_decay: Callable[[int], float]
    momentum: float


class Trainer:
    """AdamW (0.9, 0.999, 1e-8) on student and predictor, then the teacher's average."""

    def __init__(self, checkpoint: dict[str, Weights], recipe: Recipe) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self.step = 0
        self.trained = [
            (name, weight)
            for network in ("encoder", "predictor")
            for name, weight in checkpoint[network].items()
        ]
        for _, weight in self.trained:
            weight.requires_grad_()
        self._moments = [
            (torch.zeros_like(weight), torch.zeros_like(weight)) for _, weight in self.trained
        ]

    @torch.no_grad()
    def update(self) -> None:
        """One step with the gradients that the weights hold; clears them."""
        self.step += 1
        rate, decay = self.recipe.learning_rate(self.step), self.recipe.weight_decay(self.step)
        for (name, weight), (mean, square) in zip(self.trained, self._moments, strict=True):
            if weight.grad is None:
                continue
            mean.mul_(0.9).add_(0.1 * weight.grad)
            square.mul_(0.999).add_(0.001 * weight.grad.square())
            if weight.ndim > 1 and "bias" not in name:
                weight.mul_(1 - rate * decay)
            root = (square / (1 - 0.999**self.step)).sqrt()
            weight.sub_(rate * (mean / (1 - 0.9**self.step)) / (root + 1e-8))
            weight.grad = None
        student, teacher = self.checkpoint["encoder"], self.checkpoint["target_encoder"]
        for name, average in teacher.items():
            average.mul_(self.recipe.momentum).add_((1 - self.recipe.momentum) * student[name])
