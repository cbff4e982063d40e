"""DeepSpeed, and nothing of it elsewhere: ZeRO stages 0 to 3 around any objective.

Three things that DeepSpeed does silently and this file guards against: a frozen teacher's small
parameters stay at an old value when only their shard is written; accumulation is counted inside
the engine although stages change it; a step whose gradient is not finite is left out without a
word. Its checkpoints are not used at all (`zero_state`).
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from pipeline.checkpoint.pieces import Piece, TensorSource
from pipeline.clip import ClipBatch, Losses, Progress
from pipeline.engine.deepspeed_import import (
    deepspeed,
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
)
from pipeline.engine.deepspeed_import import groups as deepspeed_groups
from pipeline.engine.deepspeed_import import logger as deepspeed_logger
from pipeline.engine.zero_held import own_gradients, shape_of
from pipeline.engine.zero_settings import deepspeed_settings
from pipeline.engine.zero_state import ZeroState, refresh_gathered
from pipeline.models.teacher import AveragedShard, TeacherAverage
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions, Objective
from pipeline.optim import adamw, parameter_groups
from pipeline.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an optimiser step did."""

    gradient_norm: float
    skipped: bool
    """True if the gradient was not finite and no weight was changed."""


class _Trained(nn.Module):
    """The root that ZeRO partitions; its forward is the objective's loss."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.parts = objective.modules()
        self._objective = (objective,)  # a tuple, since the objective is no module of ours
        self.last: Losses | None = None

    def forward(self, batch: ClipBatch, progress: Progress, scale: float) -> Tensor:
        self.last = self._objective[0].loss(batch, progress)
        return self.last.total * scale


class ZeroEngine:
    """An objective's networks, optimiser and averages, spread over the ranks.

    Args:
        config: The run's configuration.
        device: This rank's device; the process group must stand.

    Attributes:
        device: The same.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        _quieten()
        self.device = device
        settings = deepspeed_settings(config, device)
        options = BuildOptions(
            attention=config.attention,
            checkpoint_activations=config.activation_checkpointing is True,
        )
        self._stage = config.zero.stage
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=self._stage == 3):
            self.objective = build_objective(config.objective, options)
            self._root = _Trained(self.objective)
        groups = parameter_groups(self.objective.modules().items())
        self._decays = [group["decays"] for group in groups]
        optimizer = adamw(groups, config.optimizer)
        # Untyped: which of its optimisers DeepSpeed wraps ours in depends on the stage.
        self._engine: Any = deepspeed.initialize(
            model=self._root, optimizer=optimizer, config=settings
        )[0]
        # DeepSpeed makes a group of its own, with a time-out of half an hour.
        group: Any = deepspeed_groups._get_data_parallel_group()
        distributed_c10d._set_pg_timeout(timedelta(seconds=config.peer_timeout_seconds), group)
        modules = self.objective.modules()
        self._state = ZeroState(modules, self._engine.optimizer, optimizer, self._stage)
        self.objective.averages = [
            self._average(student, teacher) for student, teacher in self.objective.averaged_pairs()
        ]

    def forward_backward(
        self,
        batch: ClipBatch,
        progress: Progress,
        *,
        accumulation: int,
        last: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> Losses:
        """Adds one micro-batch's gradient.

        Args:
            batch: The micro-batch, on the device.
            progress: Where the run stands.
            accumulation: Micro-batches of the step.
            last: This is the one before the optimiser's step.
            meanwhile: Called once the forward pass has been queued. Later there is nothing left to
                go on beside: DeepSpeed ends every backward pass by waiting for the device.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        scaled = self._engine(batch, progress, 1.0 / accumulation)
        losses = self._root.last
        if losses is None:
            raise RuntimeError("the engine did not run the objective's loss")
        if meanwhile is not None:
            meanwhile()
        self._engine.backward(scaled)
        return losses

    def gradient_square(self) -> Tensor:
        """This rank's part of the squared norm of the whole gradient, once that is complete.

        A scalar on the device that nobody has waited for; the sum over all ranks is the square.
        """
        if self._stage:
            gradients = own_gradients(self._engine.optimizer)
            share = 1.0
        else:
            gradients = [
                p.grad for p in self.objective.modules().parameters() if p.grad is not None
            ]
            share = 1.0 / dist.get_world_size()  # every rank holds the whole of it
        # Of no gradient at all torch makes a norm in host memory.
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True).to(self.device)
        return norm.double().square() * share

    def update(
        self, learning_rate: float, weight_decay: float, gradient_norm: float | None = None
    ) -> Update:
        """Takes the optimiser's step with these values for every group (no decay where none).

        Args:
            learning_rate: Of all groups.
            weight_decay: Of the groups that are decayed.
            gradient_norm: Norm of the whole gradient if it is known, as after an agreement of the
                ranks: it saves asking the device for it again. DeepSpeed's own look at its norm
                remains, which comes right after and finds next to nothing left to wait for.
        """
        self.set_rates(learning_rate, weight_decay)
        if gradient_norm is None:
            square = self.gradient_square()
            dist.all_reduce(square)
            gradient_norm = float(square.sqrt())
        if not self._stage and not math.isfinite(gradient_norm):
            # Plain AdamW asks nobody whether the gradient is finite.
            self._engine.zero_grad()
            return Update(gradient_norm=gradient_norm, skipped=True)
        self._engine.step()
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        return Update(gradient_norm=gradient_norm, skipped=skipped)

    def set_rates(self, learning_rate: float, weight_decay: float) -> None:
        """Sets these values for every group (no decay where none) without taking a step."""
        for group, decays in zip(self._engine.optimizer.param_groups, self._decays, strict=True):
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if decays else 0.0

    def drop(self) -> None:
        """Forgets the gradient of a step: weights, moments and averages stay as they were.

        DeepSpeed's own way of leaving a step out is the one that clears all of its buffers, and it
        takes it for a gradient that is not finite.
        """
        if not self._stage:
            self._engine.zero_grad()
            return
        for gradient in own_gradients(self._engine.optimizer):
            gradient.fill_(math.nan)
        self._engine.step()

    def adam_groups(self) -> list[dict[str, Any]]:
        """AdamW's own groups, live; for measurements that change how it runs."""
        return self._engine.optimizer.param_groups

    def group_table(self) -> list[dict[str, Any]]:
        """Name, learning rate and weight decay of every parameter group, as they stand."""
        return [
            {
                "name": group.get("name", ""),
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
            }
            for group in self._engine.optimizer.param_groups
        ]

    def pieces(self) -> list[Piece]:
        """This rank's pieces of all weights, averages and Adam's state, live.

        The pieces of all ranks together cover every tensor once, at any ZeRO stage.
        """
        return self._state.pieces(self.objective.averages)

    def load(self, source: TensorSource) -> None:
        """Takes in what `pieces` gave out at any world size and ZeRO stage; all ranks call it.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        self._state.load(source, self.objective.averages)

    def load_weights(self, source: TensorSource) -> list[str]:
        """Takes in the weights that a source has and leaves the optimiser fresh; all ranks call it.

        An average of which the source has nothing becomes a copy of its student.

        Returns:
            Names of weights that the source lacks; they are as they were.

        Raises:
            CheckpointError: A weight has another shape.
        """
        return self._state.load_weights(source, self.objective.averages)

    def stale_copies(self) -> list[str]:
        """Weights of which the network computes with something else than the optimiser holds."""
        return self._state.stale_copies()

    def _average(self, student: nn.Module, teacher: nn.Module) -> TeacherAverage:
        names = {id(p): name for name, p in self.objective.modules().named_parameters()}
        masters = self._state.full_fp32()
        pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))
        shards = [
            AveragedShard(
                name=names[id(old)],
                numel=torch.Size(shape_of(old)).numel(),
                shape=shape_of(old),
                student_fp32=partial(self._fp32_piece, new, masters.get(names[id(new)])),
                storage=self._storage(old),
            )
            for new, old in pairs
        ]
        teachers = [old for _, old in pairs]
        return TeacherAverage(shards=shards, refresh=partial(refresh_gathered, teachers))

    def _storage(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor.data if self._stage == 3 else parameter.data.view(-1)

    def _fp32_piece(self, parameter: nn.Parameter, master: Tensor | None) -> Tensor:
        """The student's counterpart of a teacher's storage, as the optimiser holds it."""
        if self._stage == 3:
            piece = safe_get_local_fp32_param(parameter)
        else:
            piece = safe_get_full_fp32_param(parameter) if self._stage else master
        if piece is None:
            raise RuntimeError("the optimiser holds no fp32 copy of a trained parameter")
        return piece.detach().view(-1)


def _quieten() -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    # An all-reduce for inference that DeepSpeed compiles on a CPU's first start. Nothing uses it,
    # and a process killed meanwhile leaves a lock that every later start waits for, without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # On CPUs torch says this for each of thousands of collectives that DeepSpeed starts.
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*")
