"""Our step beside the official repository's own networks and step, on the same clips and masks.

The official side is what its trainer's inner function does (arXiv 2506.09985 and its repository):
its encoder, predictor and teacher under DDP, the masks of a micro-batch pass by pass, its AdamW
groups, and the teacher moved by two fused multiplications. It starts from our weights, and the
losses of all steps must agree. Its checkout is given by path; nothing of it is kept here.

    python -m benchmarks.official --official PATH [--shape NAME] [--rounds N] [--zero STAGE]
"""

import argparse
import copy
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.result import print_table, spread, write_result
from benchmarks.shapes import shape_config, shapes
from benchmarks.step import NUM_BATCHES, Side, largest_difference, own_side, ratios, run_rounds
from pipeline.bench.batches import noise_batches
from pipeline.bench.step import initial_weights, measuring
from pipeline.clip import ClipBatch
from pipeline.data.augment import normalise
from pipeline.run import RunConfig

# Its weights are ours, its sums run in another order.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def main() -> int:
    """Measures, prints a table and writes benchmarks/results/official.json."""
    arguments = _arguments()
    make_networks = _networks_of(arguments.official)
    figures: dict[str, Any] = {}
    with measuring() as device:
        for name in arguments.shape or shapes(device):
            figures[name] = _compare(name, device, arguments, make_networks)
    rows = [
        (name, f["official_ms"]["median"], f["ours_ms"]["median"], f["ratio"]["median"])
        for name, f in figures.items()
    ]
    print_table("A step, ms", ("shape", "official", "ours", "ratio"), rows)
    if not arguments.dry:
        settings = {**vars(arguments), "official": _commit_of(arguments.official)}
        print(write_result("official", figures, settings))
    return 0


class OfficialStep:
    """The official networks, taking the official step on our micro-batches.

    Args:
        networks: Its encoder and predictor, in its own wrappers.
        config: The run whose rates and decay are used.
        weights: Start of `encoder.*` and `predictor.*`.
        device: Where to train.
    """

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module],
        config: RunConfig,
        weights: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        encoder, predictor = (network.to(device) for network in networks)
        _load(encoder, weights, "encoder.")
        _load(predictor, weights, "predictor.")
        teacher = copy.deepcopy(encoder)
        groups = [
            {"params": [p for name, p in network.named_parameters() if keeps(name, p)], **extra}
            for keeps, extra in ((_decays, {}), (_stays, {"weight_decay": 0.0, "exempt": True}))
            for network in (encoder, predictor)
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas)
        self._encoder = DistributedDataParallel(encoder, static_graph=True)
        self._predictor = DistributedDataParallel(predictor, find_unused_parameters=True)
        self._teacher = DistributedDataParallel(teacher).requires_grad_(False)
        self._config, self._device = config, device
        self._momentum = getattr(config.objective, "momentum").start  # noqa: B009

    def take(self, batch: ClipBatch, step: int) -> float:
        """One step on one micro-batch; returns its loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate(step)
            if not group.get("exempt"):
                group["weight_decay"] = self._config.weight_decay(step)
        mixed = self._config.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=mixed):
            loss = self._loss(batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            # Typed as tensors: the stubs of these functions know no parameters.
            old: list[Tensor] = list(self._teacher.parameters())
            new: list[Tensor] = list(self._encoder.parameters())
            torch._foreach_mul_(old, self._momentum)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(old, new, alpha=1 - self._momentum)  # pyright: ignore[reportPrivateImportUsage]
        return loss.item()

    def _loss(self, batch: ClipBatch) -> Tensor:
        clips = [normalise(batch.video_BCTHW)]
        contexts = [[mask.context_BK for mask in batch.masks]]
        targets = [[mask.target_BK for mask in batch.masks]]
        with torch.no_grad():
            wanted = [functional.layer_norm(h, h.shape[-1:]) for h in self._teacher(clips)]
        guesses = self._predictor(self._encoder(clips, contexts), contexts, targets)
        losses = []
        for guess, target_BK in zip(guesses[0], targets[0], strict=True):
            index = target_BK.unsqueeze(-1).expand(-1, -1, guess.shape[-1])
            losses.append((guess - wanted[0].gather(1, index)).abs().mean())
        return torch.stack(losses).mean()


def _compare(
    name: str, device: torch.device, arguments: argparse.Namespace, make_networks: Any
) -> dict[str, Any]:
    changes = {"zero": {"stage": arguments.zero}, "compile": not arguments.eager}
    config = shape_config(name, device, **changes)
    batches = noise_batches(config, 0, device, NUM_BATCHES)
    official = OfficialStep(make_networks(config), config, initial_weights(config), device)
    sides: dict[str, Side] = {"official": official.take, "ours": own_side(config, device)}
    seconds, losses = run_rounds(sides, batches, arguments.rounds)
    worst = largest_difference(losses, "official")
    if not worst <= _TOLERANCE[config.precision]:
        raise SystemExit(f"{name}: the losses differ by {worst:.1e}, so the steps do too")
    return {
        **{f"{side}_ms": spread([1e3 * s for s in taken], 1) for side, taken in seconds.items()},
        "ratio": spread(ratios(seconds, "official", "ours"), 3),
        "clips": len(batches[0].keys),
        "tokens_per_clip": batches[0].grid.num_tokens,
        "largest_relative_difference_of_losses": worst,
    }


def _networks_of(checkout: Path) -> Any:
    """A function from a run to the checkout's own encoder and predictor."""
    sys.path.insert(0, str(checkout))
    logging.disable(logging.WARNING)  # it prints whole networks
    if importlib.util.find_spec("timm") is None:
        # All it takes of timm is drop_path, which is the identity at the released rate of 0.
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules["timm.models.layers"], "drop_path", _never_dropped)  # noqa: B010
    encoders = importlib.import_module("src.models.vision_transformer")
    predictors = importlib.import_module("src.models.predictor")
    wrappers = importlib.import_module("src.utils.wrappers")

    def make(config: RunConfig) -> tuple[nn.Module, nn.Module]:
        stage, objective = config.stages[0], config.objective
        encoder = getattr(objective, "encoder")  # noqa: B009
        predictor = getattr(objective, "predictor")  # noqa: B009
        recompute = config.recompute(stage) is True
        shared = {
            "img_size": stage.resolution,
            "patch_size": encoder.patch_size,
            "num_frames": stage.frames,
            "tubelet_size": encoder.tubelet_size,
            "use_sdpa": True,
            "use_rope": True,
            "use_activation_checkpointing": recompute,
        }
        dims = encoder.dims
        backbone = encoders.VisionTransformer(
            embed_dim=dims.width,
            depth=dims.depth,
            num_heads=dims.heads,
            mlp_ratio=dims.mlp_hidden / dims.width,
            norm_layer=_layer_norm,
            **shared,
        )
        guesser = predictors.vit_predictor(
            embed_dim=dims.width,
            predictor_embed_dim=predictor.width,
            depth=predictor.depth,
            num_heads=predictor.heads,
            use_mask_tokens=True,
            num_mask_tokens=predictor.num_mask_tokens,
            **shared,
        )
        return wrappers.MultiSeqWrapper(backbone), wrappers.PredictorMultiSeqWrapper(guesser)

    return make


def _load(wrapper: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    mine = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    tokens = mine.pop("mask_tokens", None)
    for number, token in enumerate(tokens if tokens is not None else ()):
        mine[f"mask_tokens.{number}"] = token
    wrapper.get_submodule("backbone").load_state_dict(mine)


def _decays(name: str, parameter: Tensor) -> bool:
    return "bias" not in name and parameter.dim() > 1


def _stays(name: str, parameter: Tensor) -> bool:
    return not _decays(name, parameter)


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def _never_dropped(x: Tensor, *_: Any) -> Tensor:
    return x


def _commit_of(checkout: Path) -> str:
    head = checkout / "COMMIT"
    return head.read_text().strip() if head.is_file() else "unknown commit"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="checkout of vjepa2")
    parser.add_argument("--shape", action="append", help="default: all of this device")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="our ZeRO stage")
    parser.add_argument("--eager", action="store_true", help="do not compile our side")
    parser.add_argument("--dry", action="store_true", help="print only, write no result")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
