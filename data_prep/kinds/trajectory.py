"""Times, states and commanded actions of a robot episode, and its video put on the same clock.

DROID's files say 60 frames a second where about 15 were recorded, so frames are never placed by the
container's clock but by the recorded times, one frame for each. Actions in the sense of
V-JEPA 2-AC, changes between sampled frames, follow from the states once it is known which frames
are sampled; what is stored as actions is what was commanded, if the file has that.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from data_prep.kinds.listing import is_remote, opened_file, suffix_of
from pipeline.data.badmedia import BadMediaError, BadReason
from pipeline.data.layout import MAX_MEMBER_BYTES, SUFFIXES, Member
from pipeline.errors import UsageError

_STATE = ("observation/robot_state/cartesian_position", "observation/robot_state/gripper_position")
_COMMAND = ("action/cartesian_velocity", "action/gripper_position")
_STATE_WIDTH = 7
_CLOCKS = (
    "observation/timestamp/cameras/{serial}_estimated_capture",
    "observation/timestamp/cameras/{serial}_frame_received",
    "observation/timestamp/control/step_start",
    "observation/timestamp/robot_state/read_start",
)
_MILLISECONDS = 1e-3
# Recordings lose their last frame now and then; more than that is another recording's trajectory.
MAX_FRAMES_APART = 1
_MAX_FILE_BYTES = 1 << 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trajectory:
    """What was recorded with a video."""

    times: np.ndarray
    """Seconds from the first frame, strictly ascending, float64 [T]."""
    states: np.ndarray
    """float32 [T, S]; DROID: position in metres, Euler angles in radians, closedness of the gripper
    from 0 to 1, in the robot's frame."""
    actions: np.ndarray | None
    """What was commanded from each time to the next, float32 [T - 1, A]."""

    def cut(self, num_frames: int) -> "Trajectory":
        """The first `num_frames` rows."""
        actions = None if self.actions is None else self.actions[: num_frames - 1]
        return Trajectory(
            times=self.times[:num_frames], states=self.states[:num_frames], actions=actions
        )

    def members(self, start_seconds: float, end_seconds: float) -> dict[str, bytes]:
        """The members of a sample that shows a part of the video, on the part's own clock.

        The row in force when the part begins is its first, at time 0.

        Args:
            start_seconds: Where the part begins.
            end_seconds: Where it ends.
        """
        tolerance = 1e-6
        first = int(np.searchsorted(self.times, start_seconds + tolerance, side="right")) - 1
        last = int(np.searchsorted(self.times, end_seconds - tolerance))
        rows = slice(max(first, 0), max(last, first + 1))
        times = np.maximum(self.times[rows] - start_seconds, 0.0)
        found = {
            Member.TIMES: np.round(times, 6).astype("<f8"),
            Member.STATES: self.states[rows].astype("<f4"),
        }
        if self.actions is not None:
            found[Member.ACTIONS] = self.actions[rows.start : rows.stop - 1].astype("<f4")
        if self.actions is not None and len(found[Member.ACTIONS]) == 0:
            del found[Member.ACTIONS]
        return {SUFFIXES[member]: _npy(array) for member, array in found.items()}


def read_trajectory(locator: str, serial: str) -> Trajectory:
    """The trajectory in a DROID .h5, or in a .npz with `times`, `states` and maybe `actions`.

    Args:
        locator: Path or address of the file.
        serial: Number of the camera that took the video.

    Raises:
        BadMediaError: It cannot be read, lacks something, or its lengths disagree.
    """
    try:
        content, is_npz = _content(locator), suffix_of(locator) == ".npz"
        found = _from_npz(content) if is_npz else _from_hdf5(content, serial)
    except (OSError, KeyError, ValueError, UsageError) as error:
        raise BadMediaError(BadReason.DAMAGED, f"trajectory: {error}") from error
    return _checked(found)


def episode(content: Path | bytes, locator: str, serial: str) -> tuple[bytes, Trajectory]:
    """An episode's video with each frame where the trajectory says it was taken.

    Args:
        content: The video.
        locator: Where its trajectory is.
        serial: Number of its camera.

    Returns:
        The video, its packets untouched in another container, and the trajectory.

    Raises:
        BadMediaError: The video has more than one frame more or less than the trajectory has rows.
    """
    from data_prep.kinds.retime import retimed  # noqa: PLC0415 - brings PyAV

    trajectory = read_trajectory(locator, serial)
    video, num_frames = retimed(content, trajectory.times)
    num_rows = len(trajectory.times)
    if abs(num_frames - num_rows) > MAX_FRAMES_APART:
        raise BadMediaError(
            BadReason.LENGTHS_DISAGREE,
            f"{num_frames} frames and {num_rows} rows of the trajectory; at most "
            f"{MAX_FRAMES_APART} apart is allowed",
        )
    return video, trajectory.cut(min(num_frames, num_rows))


def _content(locator: str) -> Any:
    if not is_remote(locator):
        return locator
    with opened_file(locator) as file:
        return io.BytesIO(file.read(_MAX_FILE_BYTES))


def _from_npz(content: Any) -> dict[str, np.ndarray]:
    with np.load(content, allow_pickle=False) as found:
        return {name: found[name] for name in ("times", "states", "actions") if name in found}


def _from_hdf5(content: Any, serial: str) -> dict[str, np.ndarray]:
    import h5py  # noqa: PLC0415 - for episodes alone

    with h5py.File(content, "r") as file:
        found = {"states": _columns(file, _STATE), "times": _clock(file, serial)}
        if all(name in file for name in _COMMAND):
            found["actions"] = _columns(file, _COMMAND)[:-1]
    return found


def _columns(file: Any, names: tuple[str, ...]) -> np.ndarray:
    parts = [_dataset(file, name) for name in names]
    if len({len(part) for part in parts}) != 1:
        lengths = ", ".join(f"{n} {len(p)}" for n, p in zip(names, parts, strict=True))
        raise BadMediaError(BadReason.LENGTHS_DISAGREE, f"rows of the trajectory: {lengths}")
    columns = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    if columns.shape[1] != _STATE_WIDTH:
        raise ValueError(f"{' and '.join(names)} have {columns.shape[1]} columns, expected 7")
    return columns


def _clock(file: Any, serial: str) -> np.ndarray:
    """Seconds of the best clock there is; those of cameras are in milliseconds, as all others."""
    for name in (clock.format(serial=serial) for clock in _CLOCKS):
        if name in file:
            ticks = _dataset(file, name).astype(np.float64)
            if len(ticks) > 1 and (np.diff(ticks) > 0).all():
                return (ticks - ticks[0]) * _MILLISECONDS
    raise ValueError("no ascending time stamps in observation/timestamp")


def _dataset(file: Any, name: str) -> np.ndarray:
    dataset = file[name]
    if dataset.nbytes > MAX_MEMBER_BYTES[Member.STATES]:
        raise ValueError(f"{name} has {dataset.nbytes} bytes")
    return np.asarray(dataset[()])


def _checked(found: Mapping[str, np.ndarray]) -> Trajectory:
    missing = {"times", "states"} - found.keys()
    if missing:
        raise BadMediaError(BadReason.DAMAGED, f"trajectory: no {' and no '.join(sorted(missing))}")
    times, states, actions = found["times"], found["states"], found.get("actions")
    kept = [array for array in (times, states, actions) if array is not None]
    if [times.ndim, states.ndim] != [1, 2] or (actions is not None and actions.ndim != states.ndim):
        raise BadMediaError(BadReason.DAMAGED, "trajectory: times [T], states and actions [T, n]")
    if not all(np.issubdtype(one.dtype, np.number) and np.isfinite(one).all() for one in kept):
        raise BadMediaError(BadReason.DAMAGED, "trajectory: not finite numbers")
    count = len(times)
    if len(states) != count or (actions is not None and len(actions) not in (count, count - 1)):
        rows = ", ".join(str(len(one)) for one in kept)
        raise BadMediaError(BadReason.LENGTHS_DISAGREE, f"times, states, actions have rows: {rows}")
    if count < 2 or (np.diff(times) <= 0).any():
        raise BadMediaError(BadReason.DAMAGED, "trajectory: times do not ascend")
    return Trajectory(
        times=(times - times[0]).astype(np.float64),
        states=states.astype(np.float32),
        actions=None if actions is None else actions[: count - 1].astype(np.float32),
    )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    npy_format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
