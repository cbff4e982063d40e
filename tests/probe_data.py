"""Small labelled videos and checkpoints for the tests of probes."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data_prep.synthetic.encode import encode_h264
from pipeline.checkpoint import layout
from pipeline.checkpoint.fingerprint import fingerprint_pieces
from pipeline.checkpoint.pieces import Piece, metadata_of
from pipeline.checkpoint.save import SaveRequest, save
from pipeline.config.load import resolved_yaml
from pipeline.models.encoder import Encoder
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.probe.tasks import AttentiveConfig, ClipConfig, SsV2Data, TaskConfig
from pipeline.run import RunConfig
from tests.plain import tiny_config

TEMPLATES = ("Moving [something] left", "Moving [Something] right", "Showing [a thing]")


def write_ssv2(
    folder: Path, *, train: int = 12, validation: int = 6, prefix: str = "", size: int = 32
) -> Path:
    """A data set in the format of Something-Something V2: a square that moves, or does not."""
    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    labels = {_bare(template): str(number) for number, template in enumerate(TEMPLATES)}
    write_json(folder / "labels" / f"{prefix}labels.json", labels)
    first = 1
    for name, count in (("train", train), ("validation", validation)):
        entries = []
        for key in range(first, first + count):
            label = key % len(TEMPLATES)
            entries.append({"id": str(key), "label": "x", "template": TEMPLATES[label]})
            frames = moving_square(label, seed=key, size=size)
            (folder / "videos" / f"{key}.mp4").write_bytes(encode_h264(frames, 8))
        write_json(folder / "labels" / f"{prefix}{name}.json", entries)
        first += count
    return folder


def moving_square(label: int, *, seed: int, size: int = 32, num_frames: int = 12) -> np.ndarray:
    """uint8 [T, H, W, 3]: a bright square going left (0), right (1) or staying (2)."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_frames, size, size, 3), 40, dtype=np.uint8)
    top, colour = rng.integers(4, size - 12), rng.integers(120, 255, 3)
    path = np.linspace(0, size - 8, num_frames).astype(int)
    left = {0: path[::-1], 1: path, 2: np.full(num_frames, size // 2 - 4)}[label]
    for number, x in enumerate(left):
        frames[number, top : top + 8, x : x + 8] = colour
    return frames


def ssv2_task(folder: Path | None, **changes) -> TaskConfig:
    """A task on `write_ssv2`'s folder for the encoder of `tiny_config`."""
    folder = folder or Path("nowhere")
    settings = {
        "name": "squares",
        "data": SsV2Data(kind="ssv2", videos=folder / "videos", annotations=folder / "labels"),
        "clip": ClipConfig(frames=4, fps=4.0, segments=2, views=3, resolution=32),
        "attentive": AttentiveConfig(
            blocks=2, attention_heads=2, learning_rates=(1e-3, 3e-3), epochs=2, batch=4
        ),
        "decode_threads": 1,
        **changes,
    }
    return TaskConfig(**settings)


def tiny_encoder(seed: int = 0) -> Encoder:
    """The untrained teacher of `tiny_config`."""
    encoder = _objective(tiny_config(), seed).encoder()
    if not isinstance(encoder, Encoder):
        raise TypeError(encoder)
    return encoder


def write_run(folder: Path, steps: tuple[int, ...]) -> Path:
    """A run's folder with commits whose weights differ, as training leaves them."""
    config = tiny_config()
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(resolved_yaml(config))
    for step in steps:
        result = save(
            SaveRequest(
                run_dir=run_dir,
                run_id="r",
                step=step,
                parent_step=None,
                versions={},
                write=lambda out, step=step: _write_weights(out, config, step),
            )
        )
        assert result.failure is None, result.failure
    return run_dir


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _objective(config: RunConfig, seed: int):
    torch.manual_seed(seed)
    options = BuildOptions(attention=config.attention, checkpoint_activations=False)
    return build_objective(config.objective, options)


def _write_weights(out: Path, config: RunConfig, seed: int) -> dict[str, int]:
    weights = _objective(config, seed).modules().state_dict()
    pieces = [
        Piece(name=name, shape=tuple(tensor.shape), start=0, flat=tensor.flatten())
        for name, tensor in weights.items()
    ]
    flat = {piece.name: piece.flat.contiguous() for piece in pieces}
    save_file(flat, out / layout.weights_name(0), metadata_of(pieces))
    write_json(out / layout.STATE, {"step": seed})
    return fingerprint_pieces(pieces)


def _bare(template: str) -> str:
    return template.replace("[", "").replace("]", "")
