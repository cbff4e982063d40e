"""When the loop asks for a checkpoint: save, record, prune; stop if saving no longer works."""

import shutil
from importlib.metadata import version
from time import monotonic

from pipeline.checkpoint import layout
from pipeline.checkpoint.save import SaveRequest, prune, save
from pipeline.engine.build import Parts, run_state
from pipeline.engine.save import write_rank_files
from pipeline.errors import StorageError

# A full disk may be emptied by others; a folder that refuses three saves in a row will not heal.
_MAX_FAILED_SAVES = 3


class Saver:
    """Saves a run's checkpoints and counts failures in a row; every rank has one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._num_failed = 0

    def commit(self, step: int, num_faults: int, *, last: bool) -> None:
        """Saves step `step`; `last` says that there will be no other chance to.

        Raises:
            StorageError: The save failed, and it was the last one or the third in a row.
        """
        parts = self._parts
        begin = monotonic()
        commits = layout.list_commits(parts.run_dir)
        result = save(
            SaveRequest(
                run_dir=parts.run_dir,
                run_id=parts.run_id,
                step=step,
                parent_step=max((c.step for c in commits if c.step < step), default=None),
                versions={name: version(name) for name in ("jepa-pipeline", "torch", "deepspeed")},
                write=lambda folder: write_rank_files(
                    parts.engine, folder, run_state(parts, step, num_faults)
                ),
            )
        )
        seconds = round(monotonic() - begin, 3)
        if result.failure is not None:
            parts.tracker.event("save_failed", step=step, reason=result.failure, seconds=seconds)
            self._num_failed += 1
            if last or self._num_failed >= _MAX_FAILED_SAVES:
                free_gib = shutil.disk_usage(parts.run_dir).free / 2**30
                raise StorageError(
                    f"Step {step} could not be saved to {parts.run_dir}: {result.failure} "
                    f"({free_gib:.1f} GiB free there). The last whole checkpoint stands."
                )
            return
        self._num_failed = 0
        mib = round(result.num_bytes / 2**20, 1)
        parts.tracker.event("save", step=step, seconds=seconds, mib=mib)
        self._prune()

    def _prune(self) -> None:
        if self._parts.launch.rank != 0:
            return
        try:
            prune(self._parts.run_dir, self._parts.config.checkpoint)
        except OSError as error:
            self._parts.tracker.event("prune_failed", reason=str(error))
