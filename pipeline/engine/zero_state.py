"""What DeepSpeed holds of a run, as pieces by name: given out for saving, taken in when resuming.

Nothing of DeepSpeed's own checkpoints is used. They are pickles, bound to one world size; their
conversion to another loses frozen weights and the settings of all parameter groups but the first.

Each ZeRO stage keeps the fp32 weights that the optimiser works on somewhere else (`zero_held`).
What the network computes with is another copy, and under stage 3 small parameters have a third one
that stays gathered: taking in weights means writing all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint.pieces import MOMENTS, STEP, Piece, TensorSource
from pipeline.engine.zero_held import Held, find_held, own_share, shape_of
from pipeline.errors import CheckpointError
from pipeline.models.teacher import TeacherAverage


class ZeroState:
    """Weights, averages and Adam's state of an engine, whichever ZeRO stage holds them.

    Args:
        modules: All networks.
        wrapper: What DeepSpeed made of the optimiser.
        adamw: The optimiser inside.
        stage: ZeRO stage.
    """

    def __init__(self, modules: nn.Module, wrapper: Any, adamw: Any, stage: int) -> None:
        self._modules = modules
        self._adamw = adamw
        self._stage = stage
        self._held = list(find_held(dict(modules.named_parameters()), wrapper, adamw, stage))

    def pieces(self, averages: Sequence[TeacherAverage]) -> list[Piece]:
        """This rank's pieces of everything, live; the pieces of all ranks cover all once."""
        found = [*self._weight_pieces(averages), *self._optimizer_pieces(), *self._buffer_pieces()]
        return [piece for piece in found if piece.flat.numel()]

    def load(self, source: TensorSource, averages: Sequence[TeacherAverage]) -> None:
        """Takes in everything that `pieces` gave out at any world size and ZeRO stage.

        Raises:
            CheckpointError: A tensor is missing, has another shape, or Adam's step counts
                contradict each other.
        """
        missing = self._missing(source)
        if missing:
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} weights of this run: {_few(missing)}.",
                remedy="Was `objective` changed in RUN/config.yaml? Put it back.",
            )
        self.load_weights(source, averages)
        self._load_optimizer(source)

    @torch.no_grad()
    def load_weights(self, source: TensorSource, averages: Sequence[TeacherAverage]) -> list[str]:
        """Takes in those weights and averages that the source has, and leaves Adam's state.

        Every rank calls it with a source of the same tensors. An average of which the source has
        nothing starts again as a copy of its student.

        Returns:
            Names of weights and averages that the source lacks.

        Raises:
            CheckpointError: A weight has another shape.
        """
        missing = self._missing(source)
        for held in self._held:
            if held.name not in missing:
                held.master.copy_(_read(source, held))
        averaged = {shard.name for average in averages for shard in average.shards}
        for name, parameter in self._modules.named_parameters():
            if name not in averaged and name not in missing:
                whole_or_part = self._padded(source, name, shape_of(parameter))
                self._storage(parameter).copy_(whole_or_part)
        for name, buffer in self._buffers():
            if name not in missing:
                buffer.copy_(source.read(name, 0, buffer.numel()).view_as(buffer))
        for average in averages:
            self._load_average(source, average, set(missing))
        refresh_gathered(self._modules.parameters())
        return missing

    def stale_copies(self) -> list[str]:
        """Weights of which the network computes with something else than the optimiser holds."""
        return [held.name for held in self._held if not self._is_fresh(held)]

    def full_fp32(self) -> dict[str, Tensor]:
        """fp32 weights by name of which this rank holds every element; live, flat."""
        return {h.name: h.master for h in self._held if len(h.master) == _numel(h.shape)}

    def _weight_pieces(self, averages: Sequence[TeacherAverage]) -> Iterator[Piece]:
        for held in self._held:
            part = slice(0, None) if self._stage else own_share(len(held.master))
            start = held.start + (part.start or 0)
            yield Piece(name=held.name, shape=held.shape, start=start, flat=held.master[part])
        known = {held.name for held in self._held}
        for average in averages:
            flat = average.pieces()
            for shard in average.shards:
                known.add(shard.name)
                yield self._cut(shard.name, shard.shape, flat[shard.name])
        for name, parameter in self._modules.named_parameters():
            if name not in known and not parameter.requires_grad:
                yield self._cut(name, shape_of(parameter), self._storage(parameter).float())

    def _optimizer_pieces(self) -> Iterator[Piece]:
        for held in self._held:
            state = self._adamw.state.get(held.owner)
            if not state:
                continue  # before the first step there is none
            part = slice(0, None) if self._stage else own_share(len(held.master))
            start = held.start + (part.start or 0)
            for key in MOMENTS:
                flat = held.of_state(state[key])[part]
                yield Piece(name=f"{key}/{held.name}", shape=held.shape, start=start, flat=flat)
            if start == 0 and len(held.master[part]):
                step = torch.as_tensor(state["step"], dtype=torch.float32).reshape(1)
                yield Piece(name=f"{STEP}/{held.name}", shape=(), start=0, flat=step)

    def _buffer_pieces(self) -> Iterator[Piece]:
        if dist.get_rank() == 0:
            for name, buffer in self._buffers():
                yield Piece(name=name, shape=tuple(buffer.shape), start=0, flat=buffer.view(-1))

    def _buffers(self) -> list[tuple[str, Tensor]]:
        kept = self._modules.state_dict().keys()
        return [(name, b) for name, b in self._modules.named_buffers() if name in kept]

    @torch.no_grad()
    def _load_optimizer(self, source: TensorSource) -> None:
        saved = [h for h in self._held if _offers(source, f"{MOMENTS[0]}/{h.name}", h.shape)]
        self._make_state({id(held.owner): held.owner for held in saved}.values())
        steps: dict[int, set[float]] = {}
        for held in saved:
            state = self._adamw.state[held.owner]
            for key in MOMENTS:
                held.of_state(state[key]).copy_(_read(source, held, f"{key}/"))
            step = source.read(f"{STEP}/{held.name}", 0, 1).item()
            steps.setdefault(id(held.owner), set()).add(step)
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), step)
        if any(len(found) > 1 for found in steps.values()):
            raise CheckpointError(
                "Some weights of this checkpoint took fewer steps than others, which ZeRO stages "
                "above 0 cannot express.",
                remedy="Resume with zero.stage=0, as the checkpoint was saved.",
            )

    def _make_state(self, owners: Iterable[Tensor]) -> None:
        # Adam makes its state at its first step. One with a rate of nothing, taken by another
        # AdamW, changes no weight and gives state of the very kind that torch itself wants.
        new = [owner for owner in owners if not self._adamw.state.get(owner)]
        if not new:
            return
        fused = self._adamw.defaults["fused"]
        maker = torch.optim.AdamW(new, lr=0.0, weight_decay=0.0, fused=fused)
        gradients = [owner.grad for owner in new]
        for owner in new:
            owner.grad = torch.zeros_like(owner)
        maker.step()
        for owner, gradient in zip(new, gradients, strict=True):
            owner.grad = gradient
            self._adamw.state[owner] = maker.state[owner]

    def _missing(self, source: TensorSource) -> list[str]:
        shapes = {name: shape_of(p) for name, p in self._modules.named_parameters()}
        shapes |= {name: tuple(buffer.shape) for name, buffer in self._buffers()}
        return [name for name, shape in shapes.items() if not _offers(source, name, shape)]

    def _load_average(
        self, source: TensorSource, average: TeacherAverage, missing: set[str]
    ) -> None:
        given = [shard for shard in average.shards if shard.name not in missing]
        if not given:
            average.restart()
            return
        read = {shard.name: self._padded(source, shard.name, shard.shape) for shard in given}
        average.load({**average.pieces(), **read})

    def _is_fresh(self, held: Held) -> bool:
        parameter: Any = self._modules.get_parameter(held.name)
        part = slice(held.start, held.start + len(held.master))
        expected = held.master.to(parameter.dtype)
        copies = []
        if self._stage == 3:
            copies.append(parameter.ds_tensor.data[: len(held.master)])
        if self._stage != 3 or getattr(parameter, "ds_persist", False):
            copies.append(parameter.data.reshape(-1)[part])
        return all(torch.equal(copy, expected) for copy in copies)

    def _cut(self, name: str, shape: tuple[int, ...], flat: Tensor) -> Piece:
        """This rank's piece of a tensor that lies here whole, or as stage 3's padded partition."""
        own = own_share(_numel(shape))
        mine = flat[: own.stop - own.start] if self._stage == 3 else flat[own]
        return Piece(name=name, shape=shape, start=own.start, flat=mine)

    def _padded(self, source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
        """What belongs here of a tensor: all of it, or stage 3's partition, padded with zeros."""
        if self._stage != 3:
            return source.read(name, 0, _numel(shape))
        own = own_share(_numel(shape))
        padded = torch.zeros(-(-_numel(shape) // dist.get_world_size()))
        padded[: own.stop - own.start] = source.read(name, own.start, own.stop)
        return padded

    def _storage(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor.data if self._stage == 3 else parameter.data.view(-1)


def refresh_gathered(parameters: Iterable[nn.Parameter]) -> None:
    """Gathers stage 3's small parameters again, in one collective for all of them.

    They stay gathered on every rank; writing the shard does not change that copy. Large ones are
    gathered anew by the next pass, on a stream that does not wait for the one that wrote them: the
    collective ends by waiting for the device, and where none is needed this does.
    """
    cut: list[Any] = [p for p in parameters if hasattr(p, "ds_persist")]
    kept = [p for p in cut if p.ds_persist]
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)
    elif cut and cut[0].ds_tensor.is_cuda:
        torch.cuda.current_stream().synchronize()


def _read(source: TensorSource, held: Held, prefix: str = "") -> Tensor:
    return source.read(prefix + held.name, held.start, held.start + len(held.master))


def _offers(source: TensorSource, name: str, shape: tuple[int, ...]) -> bool:
    found = source.shape_of(name)
    if found is not None and found != shape:
        raise CheckpointError(
            f"{name} has shape {list(found)} in the checkpoint, {list(shape)} in this run.",
            remedy="Was `objective` changed in RUN/config.yaml? Put it back.",
        )
    return found is not None


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
