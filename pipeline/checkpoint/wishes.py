"""What work beside a run wants of its checkpoints; the run's own pruning obeys it.

Only the owner of a run's lease removes checkpoints. Whoever else works with them writes down here
what has to stay for now (`work`), what has to stay for good (`keep`) and what nobody needs any more
although the run's settings would keep it (`free`).
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files import write_atomically

WISHES_FILE = Path("conduct") / "wishes.json"
# Work that has not been confirmed for so long was given up by a process that died: a full disk
# would be the price of waiting for it.
WORK_EXPIRES_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """Steps by the reason for which they are to stay, and those that may go."""

    keep: Mapping[int, str] = field(default_factory=dict)
    """For good, until another list says otherwise."""
    work: Mapping[int, str] = field(default_factory=dict)
    """Until something has been done with them."""
    free: frozenset[int] = frozenset()
    """May go although `checkpoint.keep_every_steps` would keep them."""

    def why(self, step: int) -> str | None:
        """Why a step has to stay; None if nothing here asks for it."""
        return self.keep.get(step) or self.work.get(step)


def read_wishes(run_dir: Path) -> Wishes:
    """The wishes that hold now; none where nobody has any.

    Raises:
        OSError: They are there and cannot be read: then nothing may be removed.
    """
    path = run_dir / WISHES_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        is_fresh = time.time() - float(raw["confirmed"]) < WORK_EXPIRES_SECONDS
        return Wishes(
            keep={int(step): str(why) for step, why in raw["keep"].items()},
            work={int(step): str(why) for step, why in raw["work"].items()} if is_fresh else {},
            free=frozenset(int(step) for step in raw["free"]),
        )
    except FileNotFoundError:
        return Wishes()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(0, f"expected a list of wishes, got {error}", str(path)) from error


def write_wishes(run_dir: Path, wishes: Wishes) -> None:
    """Replaces the list and confirms the work in it.

    Raises:
        OSError: It cannot be written.
    """
    content = {
        "confirmed": time.time(),
        "keep": {str(step): why for step, why in sorted(wishes.keep.items())},
        "work": {str(step): why for step, why in sorted(wishes.work.items())},
        "free": sorted(wishes.free),
    }
    path = run_dir / WISHES_FILE
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
