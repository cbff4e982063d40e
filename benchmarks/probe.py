"""What a sweep of attentive heads costs on features kept on disk and on encoding in every epoch.

Both sides fit the same heads on the same clips in the same run. `sweep` is a whole probe of some
epochs, the encoding that precedes it counted in; `per_epoch` what another epoch costs. Encoding is
also told as features per second, per CPU core or per GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.result import RESULTS, print_table, write_result
from data_prep.synthetic.dataset import SyntheticConfig, write_dataset
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import Encoder, EncoderConfig
from pipeline.probe.annotations import TaskVideos, read_task
from pipeline.probe.cache import extract
from pipeline.probe.chunks import Extraction
from pipeline.probe.evaluate import evaluate
from pipeline.probe.frozen import FrozenEncoder, freeze
from pipeline.probe.records import ProbeRecord, ProbeRequest
from pipeline.probe.tasks import AttentiveConfig, ClipConfig, SsV2Data, TaskConfig

_RATES, _DECAYS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures both ways, prints a table and writes the figures."""
    asked = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="jepa-bench-probe-") as name:
        folder = Path(name)
        videos = SyntheticConfig(
            videos=asked.videos, validation=asked.videos // 2, test=1, size=asked.resolution
        )
        write_dataset(folder / "set", videos)
        task = _task(folder / "set", asked)
        encoder = freeze(_encoder(asked), task)
        figures = _measure(encoder, task, folder)
    settings = {key: str(value) for key, value in vars(asked).items() if key != "out"}
    settings["device"] = encoder.device.type
    print(f"written to {write_result('probe', figures, settings, folder=asked.out)}")
    rows = [(name, json.dumps(value)) for name, value in figures.items()]
    print_table("Probe sweep: kept features and encoding anew", ("figure", "value"), rows)
    return 0


def _measure(encoder: FrozenEncoder, task: TaskConfig, folder: Path) -> dict[str, Any]:
    videos = read_task(task)
    rate = _features_per_second(encoder, videos, task, folder / "alone")
    seconds: dict[str, dict[int, float]] = {}
    scores: dict[str, list[ProbeRecord]] = {}
    for way in ("cache", "encode"):
        for epochs in (1, task.attentive.epochs):
            attentive = task.attentive.model_copy(update={"epochs": epochs})
            asked = task.model_copy(update={"tokens": way, "attentive": attentive})
            request = ProbeRequest(
                source=folder,
                step=0,
                which="teacher",
                task=asked,
                heads=("attentive",),
                seeds=(0,),
                out=folder / f"{way}-{epochs}",
            )
            begun = time.monotonic()
            scores[way] = evaluate(encoder, videos, request, report=lambda _: None)
            seconds.setdefault(way, {})[epochs] = time.monotonic() - begun
    more = task.attentive.epochs - 1
    each = {way: (took[1 + more] - took[1]) / more for way, took in seconds.items()}
    whole = {way: took[1 + more] for way, took in seconds.items()}
    return {
        "sweep_seconds": {way: round(took, 2) for way, took in whole.items()},
        "sweep_gain": round(whole["encode"] / whole["cache"], 2),
        "epoch_seconds": {way: round(took, 2) for way, took in each.items()},
        "epoch_gain": round(each["encode"] / each["cache"], 2),
        "same_scores": scores["cache"][0].top1 == scores["encode"][0].top1,
        "features": rate,
    }


def _features_per_second(
    encoder: FrozenEncoder, videos: TaskVideos, task: TaskConfig, cache: Path
) -> dict[str, float]:
    """Clips decoded, encoded and written per second, and the same of each core or GPU."""
    asked = Extraction(
        encoder=encoder, split=videos.train, task=task, num_views=1, keep_tokens=True
    )
    few = replace(asked, split=replace(videos.train, videos=videos.train.videos[:8]))
    extract(few, cache, lambda *_: None)  # warm: kernels, decoder and page cache
    begun = time.monotonic()
    extract(asked, cache, lambda *_: None)
    clips = len(videos.train.videos) / (time.monotonic() - begun)
    on_gpu = encoder.device.type == "cuda"
    units = 1 if on_gpu else min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    return {
        "clips_per_second": round(clips, 2),
        "clips_per_second_and_gpu" if on_gpu else "clips_per_second_and_core": round(
            clips / units, 2
        ),
        "mib": round(1024 * asked.total_gib, 1),
    }


def _task(folder: Path, asked: argparse.Namespace) -> TaskConfig:
    return TaskConfig(
        name="bench",
        data=SsV2Data(kind="ssv2", videos=folder / "videos", annotations=folder / "labels"),
        clip=ClipConfig(frames=asked.frames, fps=4.0, views=1, resolution=asked.resolution),
        attentive=AttentiveConfig(
            blocks=asked.blocks,
            attention_heads=asked.heads,
            learning_rates=_RATES[: asked.rates],
            weight_decays=_DECAYS[: asked.decays],
            epochs=asked.epochs,
            batch=16,
        ),
        precision=asked.precision,
    )


def _encoder(asked: argparse.Namespace) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(size=asked.size, patch_size=asked.patch)
    return Encoder(config, attention=AttentionConfig())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="vit_small", help="encoder")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--videos", type=int, default=96, help="to train on; half as many to judge")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=1, help="of each head; 4 as published")
    parser.add_argument("--heads", type=int, default=6, help="attention heads of each head")
    parser.add_argument("--rates", type=int, default=1, help="learning rates of the sweep, up to 5")
    parser.add_argument("--decays", type=int, default=1, help="weight decays of the sweep, up to 4")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
