"""Which checkpoints stay for what was found out about them, and their removal where nobody trains.

While somebody owns the run, only the owner removes checkpoints: the conductor writes down what it
wants (`checkpoint.wishes`). When nobody does, it holds the run's lease for the moment of removing.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.checkpoint.layout import CheckpointConfig, list_commits
from pipeline.checkpoint.retain import doomed_commits, prune
from pipeline.checkpoint.wishes import Wishes, read_wishes, write_wishes
from pipeline.conduct.settings import RetentionConfig
from pipeline.errors import StorageError
from pipeline.track.lease import STALE_SECONDS, OwnerError, acquire, look

CONDUCT_FOLDER = "conduct"
"""Of a run's folder: the conductor's own lease, and its wishes."""
_CONFIRM_SECONDS = 300.0


def wishes_of(
    steps: Sequence[int],
    open_words: Mapping[int, str],
    best: Sequence[tuple[int, str]],
    config: RetentionConfig,
) -> Wishes:
    """What the conductor wants of a run's checkpoints.

    Args:
        steps: Of all checkpoints, rising.
        open_words: Step → what is still to be done with it.
        best: Steps with the best scores and why they are, best first.
        config: The conductor's settings.
    """
    # The newest wait longest for their turn, but hold least: older ones are closest to removal.
    waiting = sorted(open_words)[-config.hold_at_most :] if config.hold_at_most else []
    work = {step: f"waits for {open_words[step]}" for step in waiting}
    if not config.enabled:
        return Wishes(work=work)
    keep = dict.fromkeys(steps[-config.keep_last :], f"among the newest {config.keep_last}")
    keep |= dict(best[: config.keep_best])
    every = config.keep_every_steps
    free = {
        step
        for step in steps
        if every is not None and step % every and step not in open_words and step not in keep
    }
    return Wishes(keep=keep, work=work, free=frozenset(free))


class WishList:
    """A run's wishes, written when they change and confirmed from time to time.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._told: Wishes | None = None
        self._confirmed = 0.0

    def tell(self, wishes: Wishes) -> bool:
        """Writes the wishes if they are news; true if they are.

        Raises:
            StorageError: They cannot be written.
        """
        is_news = wishes != self._told
        if is_news or time.monotonic() - self._confirmed > _CONFIRM_SECONDS:
            try:
                write_wishes(self._run_dir, wishes)
            except OSError as error:
                raise StorageError(f"Cannot write {self._run_dir / 'conduct'}: {error}") from error
            self._told, self._confirmed = wishes, time.monotonic()
        return is_news


def is_owned(run_dir: Path) -> bool:
    """Whether a job may be writing the run's folder: then only it may remove checkpoints.

    Of the folder `conduct` in it: whether a conductor follows the run.
    """
    held = look(run_dir)
    if held is None or (held.owner is not None and held.owner.released):
        return False
    return held.age_seconds < STALE_SECONDS


def remove_unwanted(
    run_dir: Path, config: CheckpointConfig, whole: Collection[int]
) -> list[tuple[int, str]]:
    """Removes what nobody wants, if nobody owns the run and the newest checkpoint is whole.

    Args:
        run_dir: Folder of the run.
        config: The run's settings.
        whole: Steps that have been verified.

    Returns:
        Steps that were removed, and why.

    Raises:
        StorageError: The file system refuses.
    """
    try:
        if is_owned(run_dir) or not (doomed := doomed_commits(run_dir, config)):
            return []
        steps = [commit.step for commit in doomed]
        # A resume may need any older one while the newest is damaged, or not verified yet.
        if list_commits(run_dir)[-1].step not in whole:
            return []
        lease = acquire(run_dir, brief=True)
        try:
            removed = prune(run_dir, config, may_remove=lease.check)
        finally:
            lease.release()
        wishes = read_wishes(run_dir)
    except OwnerError:
        return []  # a job has just taken the run up: removing is its business now
    except OSError as error:
        raise StorageError(f"Cannot remove checkpoints of {run_dir}: {error}") from error
    return [(step, _why(step, config, wishes)) for step in steps if step in removed]


def _why(step: int, config: CheckpointConfig, wishes: Wishes) -> str:
    every = config.keep_every_steps
    parts = [f"not the first nor among the newest {config.keep_last}"]
    if step in wishes.free:
        parts.append("freed by retention.keep_every_steps now that everything is done with it")
    elif every is not None:
        parts.append(f"no multiple of {every}")
    best = ", ".join(map(str, wishes.keep))
    parts += ["not pinned", f"kept instead: {best}" if best else "nobody asked for it"]
    return "; ".join(parts)
