"""When the loop asks for a checkpoint: copy, save behind the training, record; stop if it fails.

The copy to host memory goes on beside the next step's gradients; the update after them waits for
it, since it changes what is copied. One save is in flight at a time: a second one waits for the
first. Both waits count as stall. Rank 0 knows when the save is published and tells the
others in the next step's agreement, so that all conclude it after the same step.
"""

import secrets
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoint import layout
from pipeline.checkpoint.background import Background
from pipeline.checkpoint.interval import SaveOutcome, SaveWord
from pipeline.checkpoint.mirror import upload
from pipeline.checkpoint.retain import prune
from pipeline.checkpoint.save import SaveRequest, SaveResult, save
from pipeline.checkpoint.staging import HostCopies
from pipeline.checkpoint.store import CommitStore
from pipeline.engine.build import Counts, Parts, run_state
from pipeline.engine.save import RankFiles, rank_files
from pipeline.errors import StorageError

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.25
# A fault ends the process soon after it; a save that is nearly done gets so long to become whole.
_SETTLE_SECONDS = 10.0
# Of the time between saves: measurements differ a little from save to save.
_SMALL_CHANGE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    """What this rank's thread leaves behind."""

    result: SaveResult
    pruning: str | None
    """Why older checkpoints could not be removed."""
    upload_failure: str | None
    """Why the checkpoint is not in the run's store."""
    seconds: float

    @property
    def outcome(self) -> SaveOutcome:
        """What all ranks are told."""
        if self.result.failure is not None:
            return SaveOutcome.FAILED
        return SaveOutcome.NOT_STORED if self.upload_failure else SaveOutcome.PUBLISHED


class Saver:
    """Saves a run's checkpoints and counts failures in a row; every rank has one.

    Args:
        parts: What the run works with.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._copies = HostCopies()
        self._background: Background[_Ended] = Background()
        self._in_flight: SaveRequest | None = None
        """Has begun, and the ranks have not yet agreed how it ended."""
        self._num_begun, self._num_failed = 0, 0
        # A partial folder of an earlier attempt, or of another job, is never taken for our own.
        self._token = str(_from_rank_0(secrets.token_hex(4)))
        self._told = 0.0
        """Seconds between saves that are on record."""

    def commit(self, step: int, counts: Counts, *, last: bool) -> None:
        """Begins to save step `step`; every rank calls it.

        Args:
            step: The step that has just been taken.
            counts: What the guards have counted so far.
            last: There will be no other chance: returns when the checkpoint is published.

        Raises:
            StorageError: The save, or the one before it, failed, and it was the last one or too
                many in a row have.
        """
        parts, config = self._parts, self._parts.config.checkpoint
        self.finish()
        begin = time.monotonic()
        self._background.wait()  # a failed save may have left this rank's own part behind
        files = rank_files(parts.engine, run_state(parts, step, counts))
        request = self._in_flight = self._request(step, files)
        stall = time.monotonic() - begin
        parts.saves.note_begin(stall)
        parts.tracker.event("save_begun", step=step, seconds=round(stall, 4))
        self._background.start(lambda: self._run(request, files))
        if last or not config.background:
            self.finish(last=last)

    def look(self, word: SaveWord) -> None:
        """Takes note of how the save in flight ended; every rank calls it after every step.

        Raises:
            StorageError: Too many saves in a row have failed.
            JepaError: Another job owns the run by now.
        """
        if self._in_flight is None:
            return
        self._background.result()  # raises what this rank's own part raised
        if word.outcome is not SaveOutcome.NONE:
            self._conclude(word.outcome, waited=0.0, last=False)

    def finish(self, *, last: bool = False) -> None:
        """Waits until the save in flight has ended, if there is one; every rank calls it.

        Raises:
            StorageError: It failed, and it was the last one or too many in a row have.
        """
        if self._in_flight is None:
            return
        begin, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
        # Small collectives in turn rather than one long wait: a lost peer is noticed at once, and
        # no collective outlasts its time limit however long writing takes.
        while (outcome := self._agreed_outcome()) is SaveOutcome.NONE:
            self._background.result()
            # Every round proves that all ranks live.
            self._parts.care.watchdog.begin("wait", self._in_flight.step)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
        self._conclude(outcome, waited=time.monotonic() - begin, last=last)

    def settle(self) -> None:
        """Gives a save in flight a moment to become whole before this process ends by a fault.

        Needs no other rank, since peers may be gone.
        """
        if self._in_flight is not None:
            self._background.wait(_SETTLE_SECONDS)

    def _agreed_outcome(self) -> SaveOutcome:
        own = self._parts.saves.outcome if self._parts.launch.rank == 0 else SaveOutcome.NONE
        word = torch.tensor(int(own), device=self._parts.device)
        dist.all_reduce(word)
        return SaveOutcome(int(word.item()))

    def _request(self, step: int, files: RankFiles) -> SaveRequest:
        parts, config = self._parts, self._parts.config.checkpoint
        self._num_begun += 1
        commits = layout.list_commits(parts.run_dir) if parts.launch.rank == 0 else []
        return SaveRequest(
            run_dir=parts.run_dir,
            run_id=parts.run_id,
            step=step,
            parent_step=max((c.step for c in commits if c.step < step), default=None),
            versions={name: version(name) for name in ("jepa-pipeline", "torch", "deepspeed")},
            write=files.write,
            rank=parts.launch.rank,
            world_size=parts.launch.world_size,
            token=f"{self._token}-{self._num_begun}",
            fence=parts.care.ownership.token,
            may_publish=parts.care.ownership.check,
            num_bytes=files.num_bytes,
            retries=config.retries,
            timeout_seconds=60.0 * config.timeout_minutes,
        )

    def _run(self, request: SaveRequest, files: RankFiles) -> _Ended:
        """What goes on behind the training."""
        begin = time.monotonic()
        copies = self._copies if self._parts.config.checkpoint.background else HostCopies()
        try:
            if self._parts.device.type == "cuda":
                torch.cuda.set_device(self._parts.device)
            copied = files.copied(copies)
        finally:
            self._parts.saves.copied.set()
        result = save(replace(request, write=copied.write))
        pruning = upload_failure = None
        if result.failure is None:
            pruning = self._prune() if request.rank == 0 else None
            upload_failure = self._upload(request)
        ended = _Ended(
            result=result,
            pruning=pruning,
            upload_failure=upload_failure,
            seconds=time.monotonic() - begin,
        )
        if request.rank == 0:
            # Told to the other ranks in the next step's agreement.
            self._parts.saves.outcome = ended.outcome
        return ended

    def _upload(self, request: SaveRequest) -> str | None:
        """Publishes a commit in the run's store as well; tells why it could not."""
        config = self._parts.config
        if config.checkpoint.store is None:
            return None
        try:
            store = CommitStore(config.checkpoint.store, config.run_dir.name)
        except StorageError as error:
            return str(error)
        return upload(store, request, config.checkpoint)

    def _prune(self) -> str | None:
        """Removes commits that are no longer wanted; tells why it could not."""
        try:
            prune(self._parts.run_dir, self._parts.config.checkpoint)
        except OSError as error:
            return f"{error.strerror or error} ({error.filename})"
        return None

    def _conclude(self, outcome: SaveOutcome, *, waited: float, last: bool) -> None:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            raise RuntimeError("no save is in flight")
        in_flight.give_up.set()
        self._num_failed = self._num_failed + 1 if outcome is SaveOutcome.FAILED else 0
        failure = None
        if self._parts.launch.rank == 0:
            self._background.wait()
            failure = self._record(waited)
        too_many = self._num_failed >= self._parts.config.checkpoint.max_failed_in_a_row
        if too_many or (last and outcome is not SaveOutcome.PUBLISHED):
            self._refuse(in_flight.step, outcome, _from_rank_0(failure))

    def _record(self, waited: float) -> str | None:
        """Writes down how a save ended; gives what failed, if anything did."""
        ended = self._background.result()
        if ended is None:
            raise RuntimeError("the save has not ended")
        event, result = self._parts.tracker.event, ended.result
        fields: dict[str, Any] = {"step": result.step, "seconds": round(waited, 4)}
        if result.retried:
            fields["retried"] = list(result.retried)
        if result.failure is not None:
            event("save_failed", reason=result.failure, **fields)
            return result.failure
        stall = 0.0 if self._parts.config.checkpoint.background else waited
        self._parts.saves.note_end(ended.seconds, stall)
        mib = round(result.num_bytes / 2**20, 1)
        held_up = round(self._parts.saves.held_up_seconds, 4)
        seconds = round(ended.seconds, 3)
        event("save", mib=mib, behind_seconds=seconds, held_up_seconds=held_up, **fields)
        if ended.pruning is not None:
            event("prune_failed", reason=ended.pruning)
        if ended.upload_failure is not None:
            event("upload_failed", step=result.step, reason=ended.upload_failure)
        self._tell_interval(result.step)
        return ended.upload_failure

    def _tell_interval(self, step: int) -> None:
        """Puts on record which time between saves was chosen, and why, when it changes much."""
        interval = self._parts.saves.interval
        if interval is None or abs(interval.seconds - self._told) <= _SMALL_CHANGE * self._told:
            return
        self._told = interval.seconds
        seconds = round(interval.seconds, 1)
        self._parts.tracker.event(
            "save_interval", step=step, seconds_between=seconds, reason=interval.reason
        )

    def _refuse(self, step: int, outcome: SaveOutcome, failure: str) -> None:
        run_dir = self._parts.run_dir
        if outcome is SaveOutcome.NOT_STORED:
            raise StorageError(
                f"Step {step} is saved in {run_dir}, but not in its store: {failure}",
                remedy="Mend the store or leave checkpoint.store out, then resume.",
            )
        raise StorageError(
            f"Step {step} could not be saved to {run_dir}: {failure} ({_free_space(run_dir)}). "
            "The last whole checkpoint stands."
        )


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there"
    except OSError as error:
        # A folder that was removed under the run must not hide why the save failed.
        return f"that folder: {error.strerror}"


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
