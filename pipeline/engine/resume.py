"""A commit taken up again by a fresh engine, and the proof that it arrived as it was saved."""

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


def take_up(engine: ZeroEngine, found: Found, *, seed: int) -> str:
    """Restores weights, averages, Adam's state and random generators of a verified commit.

    The commit may have been saved by any number of ranks and at any ZeRO stage. Random generators
    belong to ranks: at another number they start anew, from the run's seed, the step and the rank.

    Args:
        engine: A fresh engine of the same networks.
        found: The commit; every rank gives the same.
        seed: The run's seed.

    Returns:
        One line for people: what was restored and that it is equal to what was saved.

    Raises:
        CheckpointError: The commit is of other networks, or what the engine holds now is not what
            was saved.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    commit_dir, saved = found.commit.path, found.manifest.world_size
    with CommitTensors(commit_dir, rank=rank) as tensors:
        engine.load(tensors)
    _check_groups(read_state(commit_dir).get("groups"), engine)
    _check_fingerprints(engine, found)
    if saved == world_size:
        restore_generators(load_file(commit_dir / layout.rng_name(rank)))
        return f"saved with {saved} ranks, running {world_size}: fingerprints equal"
    seed_everything(derived_seed(seed, found.commit.step, rank))
    return (
        f"saved with {saved}, running {world_size}: resharded, fingerprints equal; random "
        "generators start anew"
    )


def derived_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random generators after a change of the number of ranks."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _check_groups(saved: list[dict[str, Any]] | None, engine: ZeroEngine) -> None:
    names = [group["name"] for group in engine.group_table()]
    known = [group["name"] for group in saved or []]
    if saved and known != names:
        raise CheckpointError(
            f"The checkpoint has the parameter groups {', '.join(known)}; this run has "
            f"{', '.join(names)}."
        )


def _check_fingerprints(engine: ZeroEngine, found: Found) -> None:
    """Compares what all ranks hold now with what the manifest says was saved."""
    names = sorted(found.manifest.fingerprints)
    own = fingerprint_pieces(engine.pieces())
    stale = engine.stale_copies()
    # Integers wrap round in the sum over ranks, which is what fingerprints add up to.
    numbers = [as_signed(own.get(name, 0)) for name in names]
    held = torch.tensor([*numbers, len(stale), len(own.keys() - set(names))])
    dist.all_reduce(held)
    *sums, num_stale, num_unknown = held.tolist()
    wrong = [
        name
        for name, total in zip(names, sums, strict=True)
        if to_text(total) != found.manifest.fingerprints[name]
    ]
    if wrong or num_stale or num_unknown:
        raise CheckpointError(_what_differs(found.commit.path, wrong, num_stale, num_unknown))


def _what_differs(commit_dir: Path, wrong: list[str], num_stale: int, num_unknown: int) -> str:
    reasons = []
    if wrong:
        some = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        reasons.append(f"{len(wrong)} tensors are not what was saved: {some}")
    if num_stale:
        reasons.append(f"{num_stale} weights of the network are not those of the optimiser")
    if num_unknown:
        reasons.append(f"{num_unknown} tensors are not in its manifest")
    return f"{commit_dir} was read, but did not arrive: {'; '.join(reasons)}."
