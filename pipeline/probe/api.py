"""For evaluators in Python: an encoder from any folder, features of a video, a probe.

    from pipeline.probe.api import load_encoder, probe

    encoder = load_encoder("runs/my-run")            # or an export, or a folder of transformers
    tokens_ND = encoder.features("clip.mp4")         # [N, D] after the final norm
    records = probe("runs/my-run", "my-task.yaml", heads=("linear", "knn"))
    print(records[0].top1, records[0].top1_interval)

Needs neither DeepSpeed nor Ray nor MLflow.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.load import load_config
from pipeline.data.augment import evaluation_views, normalise
from pipeline.data.decode import DecodeLimits, decode_frames, probe_media
from pipeline.data.sampling import clip_times
from pipeline.errors import UsageError
from pipeline.exchange.load import build_encoder
from pipeline.exchange.open import open_networks
from pipeline.models.encoder import Encoder
from pipeline.probe.evaluate import run_probe
from pipeline.probe.frozen import Which
from pipeline.probe.records import ProbeRecord, ProbeRequest
from pipeline.probe.task_files import find_task
from pipeline.probe.tasks import HeadName, TaskConfig
from pipeline.track.folder import PROBE_FOLDER

_FRAMES, _RESOLUTION, _FPS = 16, 256, 4.0


class VideoEncoder:
    """A frozen encoder with the clip size it was trained on last.

    Args:
        module: The network, in evaluation mode.
        frames: Frames of a clip.
        resolution: Height and width of a clip in pixels.
    """

    def __init__(self, module: Encoder, *, frames: int, resolution: int) -> None:
        self.module = module.to("cuda" if torch.cuda.is_available() else "cpu")
        self.frames = frames
        self.resolution = resolution

    @torch.no_grad()
    def features(self, video: Path | str | bytes | np.ndarray, *, fps: float = _FPS) -> Tensor:
        """Tokens [N, D] of one clip, fp32 on the CPU; time runs slowest, then height, then width.

        The central square of the picture is taken, its short side resized to the resolution.

        Args:
            video: A file or its bytes, from whose middle a clip is taken; or frames as they are,
                uint8 RGB [T, H, W, 3].
            fps: Frames per second that are taken from a file.

        Raises:
            UsageError: The array is no video.
            BadMediaError: The file is no video, or is damaged.
            ConfigError: The frames cannot be cut into whole tokens.
        """
        if isinstance(video, np.ndarray):
            frames_THWC = _checked(video)
        else:
            payload = video if isinstance(video, bytes) else Path(video).read_bytes()
            frames_THWC = self._decode(payload, fps)
        centre = evaluation_views(frames_THWC, self.resolution, 3)[1]
        device = next(self.module.parameters()).device
        tokens = self.module(normalise(centre[None].to(device)))
        if not isinstance(tokens, Tensor):
            raise TypeError(tokens)
        return tokens[0].float().cpu()

    def _decode(self, payload: bytes, fps: float) -> np.ndarray:
        limits = DecodeLimits()
        info = probe_media(payload, limits, decode_everything=True)
        times = clip_times(info.duration_seconds, self.frames, fps, 0.5)
        return decode_frames(payload, times, limits).frames_THWC


def load_encoder(
    path: Path | str, *, which: Which = "teacher", step: int | None = None
) -> VideoEncoder:
    """An encoder from whatever holds one, verified, on the GPU if there is one.

    Args:
        path: A run, one of its checkpoints, an exchange folder, or a folder of transformers.
        which: The averaged teacher, which evaluations use, or the student.
        step: Which checkpoint of a run; the newest otherwise.

    Raises:
        UsageError: There is nothing of the kind at `path`.
        CheckpointError: It is damaged, or holds the other encoder alone.
    """
    source = open_networks(Path(path), step)
    return VideoEncoder(
        build_encoder(source, which),
        frames=source.networks.frames or _FRAMES,
        resolution=source.networks.resolution or _RESOLUTION,
    )


def probe(
    path: Path | str,
    task: Path | str | TaskConfig,
    *,
    heads: Sequence[HeadName] = ("linear", "knn"),
    seeds: Sequence[int] = (0,),
    which: Which = "teacher",
    out: Path | str | None = None,
) -> list[ProbeRecord]:
    """Scores a frozen encoder on a labelled task, in this process.

    Args:
        path: As for `load_encoder`; of a run the newest checkpoint.
        task: A task file, the name of a shipped one, or a task.
        heads: Heads that are fitted.
        seeds: Seeds that each is drawn with.
        which: The averaged teacher or the student.
        out: Folder of the results and of cached features; `probes` in `path` otherwise.

    Returns:
        One record per head and seed, as `jepa probe --json` prints them.

    Raises:
        JepaError: As `jepa probe`.
    """
    config = task
    if not isinstance(config, TaskConfig):
        config = load_config(find_task(str(task)), TaskConfig).config
    folder = Path(path)
    source = open_networks(folder)
    step = source.provenance.get("step")
    request = ProbeRequest(
        source=source.commit_dir or folder,
        step=step if isinstance(step, int) else None,
        which=which,
        task=config,
        heads=tuple(heads),
        seeds=tuple(seeds),
        out=Path(out) if out is not None else folder / PROBE_FOLDER,
    )
    return run_probe(request, report=lambda _: None)


def _checked(frames: np.ndarray) -> np.ndarray:
    if frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8:
        return np.ascontiguousarray(frames)
    raise UsageError(
        f"expected frames as uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}",
        remedy="Give RGB frames as a decoder has them, or the path of a video.",
    )
