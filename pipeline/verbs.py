"""Every verb of `jepa`, in the order of the overview; imports nothing that a verb needs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A command: its words, the function as `module:name`, and one line for the overview."""

    words: str
    function: str
    help: str


VERBS = (
    Verb(
        words="train",
        function="pipeline.commands.train:train",
        help="Train a configuration: jepa train CONFIG [key=value ...].",
    ),
    Verb(
        words="plan",
        function="pipeline.commands.plan:plan",
        help="Stages, tokens, FLOPs, memory and GPU-hours of a configuration.",
    ),
    Verb(
        words="config show",
        function="pipeline.commands.config:show",
        help="Every key with its value and where that was written.",
    ),
    Verb(
        words="config diff",
        function="pipeline.commands.config:diff",
        help="Keys in which two configurations differ.",
    ),
    Verb(
        words="config schema",
        function="pipeline.commands.config:schema",
        help="Every key there is: what it takes, its default, what it does.",
    ),
    Verb(
        words="check",
        function="launch.preflight.commands:check",
        help="Check machines, storage, data and network before a run.",
    ),
    Verb(
        words="status",
        function="pipeline.commands.status:status",
        help="Where a run stands: step, stage, speed, last checkpoint, last error.",
    ),
    Verb(
        words="resume",
        function="pipeline.commands.train:resume",
        help="Continue a run from its last whole checkpoint.",
    ),
    Verb(
        words="stop",
        function="pipeline.commands.stop:stop",
        help="Ask a run to save and stop after the step it is in.",
    ),
    Verb(
        words="launch slurm",
        function="launch.commands:slurm",
        help="Submit a run, or work beside one, to Slurm.",
    ),
    Verb(
        words="launch k8s",
        function="launch.k8s_commands:k8s",
        help="Submit a run, or work beside one, to Kubernetes.",
    ),
    Verb(
        words="launch ray",
        function="launch.ray:ray",
        help="Train under Ray Train, here or on a running cluster.",
    ),
    Verb(
        words="launch local",
        function="launch.commands:local",
        help="Train on this machine, one rank for each GPU.",
    ),
    Verb(
        words="report",
        function="pipeline.commands.report:report",
        help="A run as one self-contained HTML page.",
    ),
    Verb(
        words="compare",
        function="pipeline.commands.compare:compare",
        help="Several runs side by side: curves, stages, scores, configuration.",
    ),
    Verb(
        words="conduct",
        function="pipeline.commands.conduct:conduct",
        help="Verify, mirror, export, probe and judge a run's checkpoints as they come.",
    ),
    Verb(
        words="probe",
        function="pipeline.commands.probe:probe",
        help="Score a checkpoint's frozen features on a labelled task.",
    ),
    Verb(
        words="ckpt ls",
        function="pipeline.commands.ckpt:ls",
        help="List a run's checkpoints.",
    ),
    Verb(
        words="ckpt verify",
        function="pipeline.commands.ckpt:verify_",
        help="Compare a run's checkpoints with their digests.",
    ),
    Verb(
        words="ckpt cat",
        function="pipeline.commands.ckpt:cat",
        help="What a checkpoint says of itself, or one tensor in numbers.",
    ),
    Verb(
        words="ckpt pin",
        function="pipeline.commands.ckpt:pin",
        help="Keep a checkpoint for good.",
    ),
    Verb(
        words="ckpt prune",
        function="pipeline.commands.ckpt:prune",
        help="Remove checkpoints that the settings no longer want.",
    ),
    Verb(
        words="ckpt import",
        function="pipeline.commands.ckpt_exchange:import_",
        help="Read an official checkpoint or a folder of transformers.",
    ),
    Verb(
        words="ckpt export",
        function="pipeline.commands.ckpt_exchange:export",
        help="Write networks for others to read, with a model card.",
    ),
    Verb(
        words="bench step",
        function="pipeline.commands.bench:step",
        help="Time, MFU and memory of a training step.",
    ),
    Verb(
        words="bench attention",
        function="pipeline.commands.bench:attention",
        help="Time every attention kernel on a configuration's calls.",
    ),
    Verb(
        words="bench loader",
        function="pipeline.commands.bench:loader",
        help="Clips per second of a configuration's loader.",
    ),
    Verb(
        words="bench stages",
        function="pipeline.commands.bench:stages",
        help="What the schedule of stages saves.",
    ),
    Verb(
        words="prep run",
        function="data_prep.commands:run",
        help="Check, transcode, shard and index a folder of videos.",
    ),
    Verb(
        words="prep lint",
        function="data_prep.look:lint",
        help="Check a dataset's digests, tars, index and clips.",
    ),
    Verb(
        words="prep index",
        function="data_prep.adopt:index",
        help="Make WebDataset tars of others trainable as they are.",
    ),
    Verb(
        words="prep preview",
        function="pipeline.commands.preview:preview",
        help="Draw clips of a dataset as the model gets them, stage by stage.",
    ),
    Verb(
        words="prep stats",
        function="data_prep.look:stats",
        help="Count a dataset and draw its histograms.",
    ),
    Verb(
        words="prep curate",
        function="pipeline.commands.curate:curate",
        help="Weight a dataset's samples by clusters of an encoder's features.",
    ),
    Verb(
        words="prep synthetic",
        function="data_prep.commands:synthetic",
        help="Render labelled synthetic clips.",
    ),
)

GROUPS = {
    "config": "Look at configurations and at what they can say.",
    "ckpt": "Look after checkpoints.",
    "bench": "Measure on this machine.",
    "launch": "Start runs on a cluster or here.",
    "prep": "Turn videos into shards.",
}
