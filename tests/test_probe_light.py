"""The evaluator's part alone: an export is loaded, encoded with and probed without the cluster."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.data.augment import normalise
from pipeline.errors import UsageError
from pipeline.exchange.load import load_encoder as load_network
from pipeline.probe.api import load_encoder
from tests.probe_data import write_run, write_ssv2

# What `pip install jepa-pipeline` without extras does not bring.
_MISSING = ("deepspeed", "ray", "mlflow", "fsspec", "s3fs", "transformers", "cv2", "sklearn")
_PROGRAM = """
import sys

class Without:
    # A finder to which some libraries are not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {missing!r}:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
torch.set_num_threads(1)
from pipeline.cli import main
from pipeline.probe.api import load_encoder, probe

run, export, task, video = sys.argv[1:]
assert main(["ckpt", "export", run, export, "--format", "hf", "--no-check"]) == 0
encoder = load_encoder(export)
tokens = encoder.features(video)
records = probe(export, task, heads=("attentive", "linear", "knn"))
print(json.dumps({{"tokens": tokens.shape, "top1": [(r.head, r.top1) for r in records]}}))
""".replace("import sys\n", "import json, sys\n", 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    write_ssv2(folder / "set", train=6, validation=3)
    write_run(folder, (20,))
    (folder / "task.yaml").write_text(
        f"""
name: squares
data: {{kind: ssv2, videos: {folder}/set/videos, annotations: {folder}/set/labels}}
clip: {{frames: 4, fps: 4.0, resolution: 32, views: 1}}
attentive: {{blocks: 1, attention_heads: 2, epochs: 2, batch: 4}}
linear: {{learning_rates: [0.01], epochs: 3}}
"""
    )
    return folder


def test_an_export_is_made_loaded_encoded_with_and_probed_without_any_extra(home):
    words = [home / "run", home / "export", home / "task.yaml", home / "set/videos/1.mp4"]
    program = _PROGRAM.format(missing=set(_MISSING))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"][1] == 48
    assert [head for head, _ in found["top1"]] == ["attentive", "linear", "knn"]
    assert (home / "export/probes/squares-imported-teacher.json").is_file()


def test_features_of_frames_are_the_networks_own_tokens_and_of_a_file_those_of_its_middle(home):
    encoder = load_encoder(home / "run")
    side = encoder.resolution
    frames = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        expected = load_network(home / "run")(normalise(video))[0]
    torch.testing.assert_close(encoder.features(frames), expected)
    path = home / "set/videos/1.mp4"
    tokens = encoder.features(path)
    assert torch.equal(tokens, encoder.features(path.read_bytes()))
    assert tokens.shape[1] == expected.shape[1]


def test_an_array_that_is_no_video_is_refused_with_what_it_is(home):
    with pytest.raises(UsageError, match=r"uint8 \[T, H, W, 3\], got float64 \[4, 8\]"):
        load_encoder(home / "run").features(np.zeros((4, 8)))
