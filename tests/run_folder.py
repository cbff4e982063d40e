"""A run's folder in the documented format, written by the tracker's own writers."""

import json
import math
import random
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.load import load_config, resolved_yaml
from pipeline.run import RunConfig
from pipeline.track.folder import update_run_info
from pipeline.track.jsonl import JsonLinesWriter
from tests.test_track_metrics import REPORT

TINY = Path("pipeline/configs/tiny-cpu.yaml").resolve()
START = 1_763_800_000.0
STAGES = (("short-64", 60, 256), ("long-64", 30, 512), ("cooldown-96", 30, 1152))


class RunFolder:
    """Plays a run of the tiny configuration and writes what a real one would write."""

    def __init__(self, path, *, seed=0):
        self.path = path
        path.mkdir(parents=True)
        config = load_config(TINY, RunConfig, [f"name={path.name}"]).config
        (path / "config.yaml").write_text(resolved_yaml(config))
        self.random = random.Random(seed)
        self.clock = START
        self.starts = []

    def start(self, *, step=0):
        self.starts.append({"time": iso(self.clock), "step": step, "world_size": 2})
        update_run_info(self.path, {"run_id": "cafe", "world_size": 2, "starts": self.starts})
        self.clock += 9.5
        self.event("resume" if step else "start", step=step)
        return self

    def steps(self, first, last, *, rank=None):
        writer = JsonLinesWriter(self.path / "metrics.jsonl")
        for step in range(first, last + 1):
            report = self.report(step, rank)
            self.clock += report.step_seconds
            writer.write({"time": self.clock, **asdict(report)})
            if step % 30 == 0:
                self.clock += 0.8
                self.event("save", step=step, seconds=0.8, mib=31.2)
        writer.close()
        return self

    def report(self, step, rank):
        stage = 0 if step <= 60 else 1 if step <= 90 else 2
        name, _, tokens = STAGES[stage]
        seconds = (0.21, 0.38, 0.9)[stage] * self.random.uniform(0.93, 1.1)
        noise = self.random.gauss(0, 0.006)
        if rank is None:
            rank = 9 + 14 * (1 - math.exp(-step / 40))
        health = {
            "feature_std": 0.45 + step / 500,
            "effective_rank": rank,
            "sigreg_gauge": 0.05 - step / 5000,
            "clip_cosine": 0.7 - step / 600,
            "between_clip_share": 0.6 + step / 900,
        }
        return replace(
            REPORT,
            step=step,
            stage=stage,
            stage_name=name,
            loss=0.42 + 0.25 * math.exp(-step / 12) + step / 2500 + noise,
            terms={"loss_mask_0": 0.40 + noise, "loss_mask_1": 0.46 + noise + step / 1500},
            learning_rate=5e-4 * min(1.0, step / 20) * (1.0 if step <= 90 else (121 - step) / 31),
            momentum=0.98 + 0.02 * step / 120,
            gradient_norm=abs(1.4 + 30 * noise),
            step_seconds=seconds,
            data_wait_seconds=seconds * abs(self.random.gauss(0.02, 0.02)),
            tokens=8 * tokens,
            peak_memory_gib=0.9 + 0.3 * stage,
            health=health if step % 10 == 0 or step == 1 else None,
        )

    def event(self, name, **fields):
        writer = JsonLinesWriter(self.path / "events.jsonl")
        writer.write({"time": self.clock, "event": name, **fields})
        writer.close()
        return self

    def probe(self, head, step, top1, *, seed=0, num_val=240):
        folder = self.path / "probes"
        folder.mkdir(exist_ok=True)
        record = {"task": "synthetic", "head": head, "step": step, "which": "teacher", "seed": seed}
        record |= {"top1": top1, "top5": 0.9, "chance": 1 / 12, "num_val": num_val}
        name = f"synthetic-step{step:08d}-teacher-{head}-seed{seed}.json"
        (folder / name).write_text(json.dumps(record))
        return self

    def fault(self, key, reason):
        writer = JsonLinesWriter(self.path / "quarantine.jsonl")
        fault = {"position": 77, "dataset": "data/tiny", "shard": "shard-000000.tar"}
        writer.write({**fault, "key": key, "reason": reason})
        writer.close()
        return self


def iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def finished_run(path):
    """A whole run: a stop and a resume, probes of both ends, two bad samples."""
    run = RunFolder(path).start().steps(1, 47)
    run.event("stop", reason="SIGTERM was received")
    run.clock += 65.0
    run.start(step=30).steps(31, 120)
    run.event("end", step=120, reason="all stages are done")
    for seed in range(3):
        run.probe("linear", 0, 0.20 + seed / 100, seed=seed)
        run.probe("linear", 60, 0.33 + seed / 80, seed=seed)
        run.probe("linear", 120, 0.41 + seed / 80, seed=seed)
        run.probe("attentive", 0, 0.26 + seed / 70, seed=seed)
        run.probe("attentive", 120, 0.55 + seed / 60, seed=seed)
    run.probe("knn", 0, 0.15).probe("knn", 120, 0.24)
    run.fault("broken", "truncated after 3 of 16 frames").fault("<b>evil</b>", "empty file")
    return run
