"""The step as one would first write it: plain PyTorch and DDP, shaped like the released trainer.

Written from the formulas of arXiv 2506.09985 and of V-JEPA 2's rotary positions. What our step
does otherwise is done here the straightforward way: one student and one predictor pass per mask,
each with a patch embedding of the whole clip; angles of queries and of keys computed in every
layer; the teacher replaced by a new state dict; AdamW without fused kernels. The loss is the same.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipeline.clip import ClipBatch, Grid
from pipeline.models.layers import ModelDims
from pipeline.run import RunConfig

_EPS = 1e-6
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def turn(x: Tensor, position_BN: Tensor) -> Tensor:
    """Rotates one axis' part [B, heads, N, a] of queries or keys, angles computed on the spot."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = position_BN[:, None, :, None].to(x.dtype) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * angle.cos() + swapped * angle.sin()


class ReferenceBlock(nn.Module):
    """Pre-norm block with rotary attention; parameter names as released."""

    def __init__(self, dims: ModelDims) -> None:
        super().__init__()
        width = dims.width
        self.heads = dims.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, dims.mlp_hidden), "fc2": nn.Linear(dims.mlp_hidden, width)}
        )

    def forward(self, x_BND: Tensor, index_BN: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] → [B, N, D] for tokens with these indices."""
        x_BND = x_BND + self._attention(self.norm1(x_BND), index_BN, grid)
        hidden = functional.gelu(self.mlp["fc1"](self.norm2(x_BND)))
        return x_BND + self.mlp["fc2"](hidden)

    def _attention(self, x_BND: Tensor, index_BN: Tensor, grid: Grid) -> Tensor:
        qkv = self.attn["qkv"](x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        frame = grid.h * grid.w
        positions = (index_BN // frame, index_BN % frame // grid.w, index_BN % grid.w)
        axis = 2 * (query.shape[-1] // 3 // 2)
        query, key = (
            torch.cat(
                [
                    *(
                        turn(one[..., i * axis : (i + 1) * axis], positions[i])
                        for i in range(len(positions))
                    ),
                    one[..., 3 * axis :],
                ],
                dim=-1,
            )
            for one in (query, key)
        )
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](out.transpose(1, 2).flatten(2))


class ReferenceEncoder(nn.Module):
    """Vision Transformer over tubelets."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        encoder = getattr(config.objective, "encoder")  # noqa: B009 - only jepa's objective has one
        kernel = (encoder.tubelet_size, encoder.patch_size, encoder.patch_size)
        dims = encoder.dims
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dims.width, kernel, kernel)})
        self.blocks = nn.ModuleList(ReferenceBlock(dims) for _ in range(dims.depth))
        self.norm = nn.LayerNorm(dims.width, eps=_EPS)

    def forward(self, video_BCTHW: Tensor, grid: Grid, keep_BK: Tensor | None = None) -> Tensor:
        """Features of the kept tokens, all of them without a mask."""
        x_BND = self.patch_embed["proj"](video_BCTHW).flatten(2).transpose(1, 2)
        index_BN = torch.arange(grid.num_tokens, device=x_BND.device).expand(len(x_BND), -1)
        if keep_BK is not None:
            x_BND, index_BN = _take(x_BND, keep_BK), keep_BK
        for block in self.blocks:
            x_BND = block(x_BND, index_BN, grid)
        return self.norm(x_BND)


class ReferencePredictor(nn.Module):
    """Narrow transformer over context and mask tokens, sorted by position."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        width = getattr(config.objective, "encoder").dims.width  # noqa: B009
        settings = getattr(config.objective, "predictor")  # noqa: B009
        dims = settings.dims
        self.predictor_embed = nn.Linear(width, dims.width)
        self.mask_tokens = nn.Parameter(torch.zeros(settings.num_mask_tokens, 1, 1, dims.width))
        self.predictor_blocks = nn.ModuleList(ReferenceBlock(dims) for _ in range(dims.depth))
        self.predictor_norm = nn.LayerNorm(dims.width, eps=_EPS)
        self.predictor_proj = nn.Linear(dims.width, width)

    def forward(self, x_BKD: Tensor, context_BK: Tensor, target_BK: Tensor, grid: Grid) -> Tensor:
        """Predicted features of the target tokens."""
        query_BKD = self.mask_tokens[0].expand(*target_BK.shape, -1)
        x_BND = torch.cat((self.predictor_embed(x_BKD), query_BKD), dim=1)
        index_BN = torch.cat((context_BK, target_BK), dim=1)
        order_BN = index_BN.argsort(dim=1)
        x_BND, index_BN = _take(x_BND, order_BN), index_BN.gather(1, order_BN)
        for block in self.predictor_blocks:
            x_BND = block(x_BND, index_BN, grid)
        x_BND = _take(self.predictor_norm(x_BND), order_BN.argsort(dim=1))
        return self.predictor_proj(x_BND[:, context_BK.shape[1] :])


class ReferenceStep:
    """Networks, DDP, optimiser and teacher; a process group must stand.

    Args:
        config: The run; its objective must be the masked prediction of this project.
        weights: Start of `encoder.*` and `predictor.*`, as the released state dicts name them.
        device: Where to train.
    """

    def __init__(
        self, config: RunConfig, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        encoder = ReferenceEncoder(config).to(device)
        predictor = ReferencePredictor(config).to(device)
        encoder.load_state_dict(_below(weights, "encoder."))
        predictor.load_state_dict(_below(weights, "predictor."))
        self._teacher = copy.deepcopy(encoder).requires_grad_(False)
        self._encoder = DistributedDataParallel(encoder, static_graph=True)
        self._predictor = DistributedDataParallel(predictor, find_unused_parameters=True)
        self._config = config
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.0}
                if decays
                else {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
                for parameters in (list(encoder.parameters()), list(predictor.parameters()))
                for decays in (True, False)
            ],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )

    def take(self, batch: ClipBatch, step: int, momentum: float) -> float:
        """One step on one micro-batch; returns its loss."""
        self._schedule(step)
        video_BCTHW = _normalise(batch.video_BCTHW)
        with self._autocast:
            loss = self._loss(video_BCTHW, batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._move_teacher(momentum)
        return loss.item()

    def _loss(self, video_BCTHW: Tensor, batch: ClipBatch) -> Tensor:
        with torch.no_grad():
            target_BND = self._teacher(video_BCTHW, batch.grid).float()
            target_BND = functional.layer_norm(target_BND, target_BND.shape[-1:])
        losses = []
        for mask in batch.masks:
            context_BKD = self._encoder(video_BCTHW, batch.grid, mask.context_BK)
            guess_BKD = self._predictor(context_BKD, mask.context_BK, mask.target_BK, batch.grid)
            wanted_BKD = _take(target_BND, mask.target_BK)
            losses.append((guess_BKD - wanted_BKD).abs().mean())
        return sum(losses, torch.zeros((), device=video_BCTHW.device)) / len(losses)

    def _schedule(self, step: int) -> None:
        for number, group in enumerate(self._optimizer.param_groups):
            group["lr"] = self._config.learning_rate(step)
            group["weight_decay"] = 0.0 if number % 2 else self._config.weight_decay(step)

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        student = self._encoder.module.state_dict()
        moved = {
            name: momentum * old + (1.0 - momentum) * student[name]
            for name, old in self._teacher.state_dict().items()
        }
        self._teacher.load_state_dict(moved)


def _normalise(video: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(v, device=video.device).mul(255).view(3, 1, 1, 1) for v in (_MEAN, _STD)
    )
    return (video.float() - mean) / std


def _take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return x_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
