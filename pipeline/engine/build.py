"""From a configuration to the parts that the loop works with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.checkpoint.interval import SaveClock
from pipeline.checkpoint.load import read_state
from pipeline.clip import MicroBatchPlan
from pipeline.config.load import resolved_yaml
from pipeline.data.cursor import DataIdentity, check_same
from pipeline.data.loader import Loader, make_loader
from pipeline.engine.check import check_run
from pipeline.engine.feed import DeviceFeed
from pipeline.engine.init import Origin, load_initial, open_initial
from pipeline.engine.resume import TakenUp, schedule_of, take_up
from pipeline.engine.rundir import Start, Wish
from pipeline.engine.supervision import Supervision
from pipeline.engine.tune import StageTuner
from pipeline.engine.zero import ZeroEngine
from pipeline.environment import Launch, seed_everything
from pipeline.masks.collate import collate_plan
from pipeline.run import RunConfig
from pipeline.stages import Share, micro_batch_plans
from pipeline.track.folder import read_run_info
from pipeline.track.rewinds import Rewind, left_out
from pipeline.track.sinks import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything that the loop works with."""

    config: RunConfig
    launch: Launch
    device: torch.device
    run_id: str
    engine: ZeroEngine
    loader: Loader
    feed: DeviceFeed
    """The loader's micro-batches, on the device."""
    tuner: StageTuner
    tracker: Tracker
    care: Supervision
    identity: DataIdentity
    first_step: int
    """The step to take first: 1, or the one after the commit that the run goes on from."""
    is_fresh: bool
    """True if the run goes on from nothing."""
    faults_before: int
    """Bad samples of earlier attempts that count."""
    saves: SaveClock
    """When a checkpoint is due, and how far the one in flight is."""
    origin: Origin | None = None
    """Weights that a fresh run was started from, if it was given any."""
    taken_up: TakenUp | None = None
    """How a resumed run was taken up."""
    losses_before: tuple[float, ...] = ()
    """Losses that the next one is compared with."""
    token: int = 0
    """Fencing token of this job."""
    rewinds: tuple[Rewind, ...] = ()
    """Steps that are left out."""
    data_changes: tuple[str, ...] = ()
    """In what the data differs from the checkpoint's, where that was allowed."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir


def build(
    config: RunConfig,
    launch: Launch,
    device: torch.device,
    start: Start,
    wish: Wish,
    care: Supervision,
) -> Parts:
    """Opens the data, builds the networks and restores the commit, if there is one.

    Raises:
        JepaError: Data, configuration or checkpoint are not what they must be.
    """
    identity = check_run(config, launch.world_size)
    state = read_state(start.found.commit.path) if start.found else None
    changes: tuple[str, ...] = ()
    if state is not None:
        saved, allowed = DataIdentity.from_dict(state["data"]), wish.allow_dataset_change
        changes = check_same(saved, identity, allow_dataset_change=allowed)
    first_step = state["step"] + 1 if state else 1
    given = open_initial(config) if state is None else None
    # Workers start first: they import and decode while the networks are built.
    plans = partial(rank_plans, config, launch, first_step, start.rewinds)
    loader = _loader(config, plans, device)
    seed_everything(config.seed)
    engine = ZeroEngine(config, device)
    taken_up = None if start.found is None else take_up(engine, start.found, config)
    origin = None if given is None else load_initial(engine, config, given)
    tracker = _tracker(config, launch, resume=state is not None)
    recorded = read_run_info(config.run_dir).get("tuning", {})
    return Parts(
        origin=origin,
        taken_up=taken_up,
        config=config,
        launch=launch,
        device=device,
        run_id=start.run_id,
        engine=engine,
        loader=loader,
        feed=DeviceFeed(loader, device),
        tuner=StageTuner(config, launch, device, engine, tracker, recorded),
        tracker=tracker,
        care=care,
        identity=identity,
        first_step=first_step,
        is_fresh=state is None,
        faults_before=state["num_faults"] if state else 0,
        saves=SaveClock(config.checkpoint),
        losses_before=tuple(state.get("recent_losses", ())) if state else (),
        token=start.token,
        rewinds=start.rewinds,
        data_changes=changes,
    )


def _loader(
    config: RunConfig, plans: Callable[[], Iterator[MicroBatchPlan]], device: torch.device
) -> Loader:
    return make_loader(
        config.data,
        plans=plans,
        collate=partial(collate_plan, seed=config.seed),
        seed=config.seed,
        pin=device.type == "cuda",
    )


def rank_plans(
    config: RunConfig, launch: Launch, first_step: int, rewinds: tuple[Rewind, ...]
) -> Iterator[MicroBatchPlan]:
    """The micro-batches of a rank from a step to the run's end; called in every loader worker."""
    share = Share(global_batch=config.global_batch, rank=launch.rank, world_size=launch.world_size)
    plans = micro_batch_plans(
        config.stages, share, first_step, config.num_steps, config.masks, config.grid
    )
    return (plan for plan in plans if not left_out(plan.step, rewinds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What guards count and a checkpoint keeps."""

    num_faults: int
    """Bad samples of the run so far."""
    recent_losses: tuple[float, ...] = ()
    """Losses that the next one is compared with."""


def run_state(parts: Parts, step: int, counts: Counts) -> dict:
    """What state.json keeps: the same on all ranks, and all that a resume needs besides weights."""
    return {
        "step": step,
        "position": step * parts.config.global_batch,
        "run_id": parts.run_id,
        "data": parts.identity.to_dict(),
        "groups": parts.engine.group_table(),
        "schedule": schedule_of(parts.config, step),
        "num_faults": counts.num_faults,
        "recent_losses": list(counts.recent_losses),
        "world_size": dist.get_world_size(),
    }


def _tracker(config: RunConfig, launch: Launch, *, resume: bool) -> Tracker:
    tracker = Tracker(
        config.track,
        plan=config.stage_costs(),
        world_size=launch.world_size,
        is_main=launch.rank == 0,
    )
    tracker.start(config.run_dir, resolved_yaml(config), resume=resume)
    return tracker
