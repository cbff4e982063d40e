"""Where each ZeRO stage keeps the fp32 weights that the optimiser works on.

DeepSpeed's own getters give whole parameters (stages 1 and 2) or nothing (stage 0), at the price of
a collective for each; a rank that saves or loads needs its own run of elements and no more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint.pieces import share


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """This rank's run of elements of a trained parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Index of the first element in the flattened parameter."""
    master: Tensor
    """[n]: the fp32 elements that the optimiser works on; a view."""
    owner: Tensor
    """The tensor by which the optimiser knows them; under ZeRO many parameters share one."""
    offset: int
    """Index of the first element in the flattened owner."""

    def of_state(self, state: Tensor) -> Tensor:
        """[n]: the elements of one of the owner's moments that belong to this run; a view."""
        return state.view(-1)[self.offset : self.offset + self.master.numel()]


def find_held(
    named: Mapping[str, nn.Parameter], wrapper: Any, adamw: Any, stage: int
) -> Iterator[Held]:
    """This rank's runs of elements of all trained parameters.

    Args:
        named: All parameters by name.
        wrapper: What DeepSpeed made of the optimiser.
        adamw: The optimiser inside.
        stage: ZeRO stage.
    """
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if stage == 3:
        yield from (_held_by_stage_3(name, p, wrapper) for name, p in trained.items())
    elif stage:
        for name, parameter in trained.items():
            yield from _held_by_stage_1_or_2(name, parameter, wrapper)
    else:
        yield from _held_whole(trained, wrapper, adamw)


def _held_by_stage_3(name: str, parameter: Any, wrapper: Any) -> Held:
    # grad_position is where DeepSpeed's own safe_get_local_fp32_param looks a piece up.
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    owner = wrapper.fp32_partitioned_groups_flat[group]
    own = own_share(parameter.ds_numel)
    master = owner.detach()[offset : offset + own.stop - own.start]
    shape = shape_of(parameter)
    return Held(name=name, shape=shape, start=own.start, master=master, owner=owner, offset=offset)


def _held_by_stage_1_or_2(name: str, parameter: Any, wrapper: Any) -> Iterator[Held]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return  # all of it lies with other ranks
    place = mapping.get_hp_fragment_address()
    yield Held(
        name=name,
        shape=tuple(parameter.shape),
        start=mapping.lp_fragment_address.start,
        master=mapping.hp_fragment.detach(),
        owner=wrapper.optimizer.param_groups[mapping.param_group_index]["params"][0],
        offset=place.start,
    )


def _held_whole(trained: dict[str, nn.Parameter], wrapper: Any, adamw: Any) -> Iterator[Held]:
    # In bf16, fp32 copies stand in the optimiser's groups in the order of the network's own.
    networks = getattr(wrapper, "fp16_groups", [group["params"] for group in adamw.param_groups])
    masters = [group["params"] for group in adamw.param_groups]
    names = {id(parameter): name for name, parameter in trained.items()}
    for in_network, in_optimizer in zip(networks, masters, strict=True):
        for parameter, master in zip(in_network, in_optimizer, strict=True):
            name, shape = names[id(parameter)], tuple(parameter.shape)
            flat = master.detach().view(-1)
            yield Held(name=name, shape=shape, start=0, master=flat, owner=master, offset=0)


def own_gradients(wrapper: Any) -> list[Tensor]:
    """This rank's part of the reduced gradient under ZeRO, live; no part is another rank's too.

    Args:
        wrapper: What DeepSpeed made of the optimiser.
    """
    if hasattr(wrapper, "averaged_gradients"):
        groups = wrapper.averaged_gradients.values()
        return [one for group in groups for one in group or () if one is not None]
    # Stage 1 in bf16 is a class of its own, which keeps them in one tensor for each group.
    return list(wrapper.fp32_groups_gradient_flat_partition)


def own_share(numel: int) -> slice:
    """This rank's run of elements of a flattened tensor, as stage 3 cuts it."""
    return share(numel, dist.get_rank(), dist.get_world_size())


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a whole parameter, also where this rank holds a partition only."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
