"""`python -m launch.k8s_files [--check]`: the rendered files in k8s/, from the examples there.

What a platform engineer reads and edits there is what `jepa launch k8s` makes; a test holds both
equal.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch.job import JobSpec, parse_duration
from launch.k8s import objects
from launch.k8s_text import to_yaml
from launch.site import Site
from pipeline.config.load import load_config
from pipeline.files import write_atomically
from pipeline.run import RunConfig

FOLDER = Path(__file__).parents[1] / "k8s"
RENDERED = "job.yaml"
_PREP = ("prep", "run", "/data/videos", "--out", "/data/shards")
_PROBE = ("probe", "runs/example", "--task", "/data/task.yaml", "--steps", "0,last")
_CONDUCT = ("conduct", "runs/example")
_HEADER = (
    "# Made by `python -m launch.k8s_files`; `jepa launch k8s CONFIG --print` makes yours.\n"
    "# Edit the site file rather than this.\n"
)


def rendered_files() -> dict[Path, str]:
    """Every rendered file and what it should hold."""
    gpu, cpu = _site("site-gpu.yaml"), _site("site-cpu.yaml")
    small = gpu.model_copy(update={"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 16})
    jobs = {
        "jobset": (_train(gpu, "run.yaml"), gpu),
        "indexed-job": (_train(gpu, "run.yaml"), _of_kind(gpu, "job", {"queue": None})),
        "trainjob": (_train(gpu, "run.yaml"), _of_kind(gpu, "trainjob")),
        "ray-train": (_train(gpu, "run.yaml"), _of_kind(gpu, "rayjob")),
        "cpu": (_train(cpu, "run-cpu.yaml"), cpu),
        "ray-prep": (_side("prep", _PREP, small), small),
        "ray-conduct": (_side("conduct", _CONDUCT, small), small),
        "ray-probe": (_side("probe", _PROBE, gpu), gpu),
    }
    return {
        FOLDER / "overlays" / name / RENDERED: _HEADER + to_yaml(objects(job, site))
        for name, (job, site) in jobs.items()
    }


def main() -> int:
    """Writes the files, or with --check says which of them differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    only_check, stale = parser.parse_args().check, list[Path]()
    for path, text in rendered_files().items():
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(path)
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    for path in stale:
        sys.stdout.write(f"{'differs' if only_check else 'written'}: {path}\n")
    return int(bool(stale) and only_check)


def _site(name: str) -> Site:
    return load_config(FOLDER / name, Site).config


def _of_kind(site: Site, kind: str, changes: Mapping[str, object] | None = None) -> Site:
    k8s = site.k8s.model_copy(update={"kind": kind, **(changes or {})})
    return site.model_copy(update={"k8s": k8s})


def _train(site: Site, name: str) -> JobSpec:
    config = load_config(FOLDER / name, RunConfig).config
    work_dir, path = Path(site.k8s.work_dir), Path("/frozen.yaml")
    return replace(
        _machines(site),
        name=config.name,
        kind="train",
        argv=("train", str(path), "--or-resume"),
        run_dir=work_dir / config.run_dir,
        config_path=path,
        # The file as it was written: defaults of later versions need no new file here.
        config_text=(FOLDER / name).read_text(),
    )


def _side(kind: str, argv: tuple[str, ...], site: Site) -> JobSpec:
    # Side work needs no machine of its own for each rank of the run that it looks at.
    nodes = 2 if kind == "prep" else 1
    return replace(_machines(site), name=f"example-{kind}", kind=kind, argv=argv, nodes=nodes)


def _machines(site: Site) -> JobSpec:
    return JobSpec(
        name="example",
        kind="train",
        argv=(),
        work_dir=Path(site.k8s.work_dir),
        nodes=site.nodes,
        gpus_per_node=site.gpus_per_node,
        ranks_per_node=site.ranks_per_node or site.gpus_per_node or 1,
        cpus_per_rank=site.cpus_per_rank,
        memory_gib=site.memory_gib,
        time_limit_seconds=parse_duration(site.time),
        grace_seconds=site.grace_seconds,
        environment=site.environment,
        image=site.image,
    )


if __name__ == "__main__":
    sys.exit(main())
