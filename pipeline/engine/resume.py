"""A commit taken up again by a fresh engine, and the proof that it arrived as it was saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import as_signed, fingerprint_pieces, to_text
from pipeline.checkpoint.load import Found, read_state
from pipeline.checkpoint.reshard import CommitTensors
from pipeline.engine.save import restore_generators
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import seed_everything
from pipeline.errors import CheckpointError
from pipeline.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenUp:
    """How a run was taken up."""

    words: str
    """One line: from how many ranks to how many, and that it arrived."""
    changes: tuple[str, ...] = ()
    """What the configuration now says otherwise of the step that was saved."""

    def to_dict(self) -> dict[str, Any]:
        """For the run's events."""
        return {"resumed": self.words, "changes": list(self.changes)}


def take_up(engine: ZeroEngine, found: Found, config: RunConfig) -> TakenUp:
    """Restores weights, averages, Adam's state and random generators of a verified commit.

    The commit may have been saved by any number of ranks and at any ZeRO stage. Random generators
    belong to ranks: at another number they start anew, from the run's seed, the step and the rank.

    Args:
        engine: A fresh engine of the same networks.
        found: The commit; every rank gives the same.
        config: The run.

    Raises:
        CheckpointError: The commit is of other networks, or what the engine holds now is not what
            was saved.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    commit_dir, saved = found.commit.path, found.manifest.world_size
    with CommitTensors(commit_dir, rank=rank, world_size=world_size) as tensors:
        engine.load(tensors)
    _check_fingerprints(engine, found)
    state = read_state(commit_dir)
    _check_groups(state, engine)
    changes = _set_rates(state, engine, config)
    if saved == world_size:
        restore_generators(load_file(commit_dir / layout.rng_name(rank)))
        words = f"saved with {saved}, running {world_size}: fingerprints equal"
        return TakenUp(words=words, changes=changes)
    seed_everything(derived_seed(config.seed, found.commit.step, rank))
    words = (
        f"saved with {saved}, running {world_size}: resharded, fingerprints equal; random "
        "generators start anew"
    )
    return TakenUp(words=words, changes=changes)


def derived_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random generators after a change of the number of ranks."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _check_groups(state: dict[str, Any], engine: ZeroEngine) -> None:
    """The same groups in the same order; settings of one group must not become another's."""
    known = [group["name"] for group in state["groups"]]
    names = [group["name"] for group in engine.group_table()]
    if known != names:
        raise CheckpointError(
            f"The checkpoint has the parameter groups {', '.join(known)}; this run has "
            f"{', '.join(names)}."
        )


def _set_rates(state: dict[str, Any], engine: ZeroEngine, config: RunConfig) -> tuple[str, ...]:
    """Puts the groups to what the schedules say of the saved step, and tells what they said then.

    Schedules are functions of the configuration and the step. They differ from what was saved only
    if somebody edited the run's configuration, which is allowed and must not go unseen.
    """
    step = state["step"]
    if not step:
        return ()
    now = schedule_of(config, step)
    engine.set_rates(now["learning_rate"], now["weight_decay"])
    then = state.get("schedule") or now
    return tuple(
        f"{name.replace('_', ' ')} of step {step} was {then[name]:g} when it was saved, the "
        f"configuration now says {value:g}"
        for name, value in now.items()
        if then[name] != value
    )


def schedule_of(config: RunConfig, step: int) -> dict[str, float]:
    """What the optimiser is told at a step, as state.json keeps it."""
    if not step:
        return {}
    return {
        "learning_rate": config.learning_rate(step),
        "weight_decay": config.weight_decay(step),
    }


def _check_fingerprints(engine: ZeroEngine, found: Found) -> None:
    """Compares what all ranks hold now with what the manifest says was saved."""
    names = sorted(found.manifest.fingerprints)
    own = fingerprint_pieces(engine.pieces())
    stale = engine.stale_copies()
    # Integers wrap round in the sum over ranks, which is what fingerprints add up to.
    numbers = [as_signed(own.get(name, 0)) for name in names]
    # Where the ranks' group speaks: NCCL takes nothing that lies in host memory.
    counted = [*numbers, len(stale), len(own.keys() - set(names))]
    held = torch.tensor(counted, device=engine.device)
    dist.all_reduce(held)
    *sums, num_stale, num_unknown = held.tolist()
    wrong = [
        name
        for name, total in zip(names, sums, strict=True)
        if to_text(total) != found.manifest.fingerprints[name]
    ]
    if wrong or num_stale or num_unknown:
        raise CheckpointError(
            _what_differs(found.commit.path, wrong, num_stale, num_unknown),
            remedy="Go on from an older one, `jepa resume RUN --step N`: `jepa ckpt ls RUN` lists "
            "them, `jepa ckpt verify RUN` checks them.",
        )


def _what_differs(commit_dir: Path, wrong: list[str], num_stale: int, num_unknown: int) -> str:
    reasons = []
    if wrong:
        some = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        reasons.append(f"tensors that are not what was saved, {len(wrong)} in all: {some}")
    if num_stale:
        reasons.append(f"{num_stale} weights of the network are not those of the optimiser")
    if num_unknown:
        reasons.append(f"{num_unknown} tensors are not in its manifest")
    return f"{commit_dir} was read, but did not arrive: {'; '.join(reasons)}."
