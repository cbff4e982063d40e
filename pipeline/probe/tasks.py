"""What a probe measures: the task file, read as the sections below.

A task file names the labelled videos, how clips are cut from them, and which heads are fitted on
the frozen tokens. Paths in it are relative to the folder the command runs in.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section

Pooling = Literal["clip", "time", "cells"]
HeadName = Literal["attentive", "linear", "knn"]


class SsV2Data(Section):
    """Videos and annotation files in the format of Something-Something V2."""

    kind: Literal["ssv2"]
    """`ssv2`: a folder of `<id>.webm` or `<id>.mp4` and the dataset's own JSON files."""
    videos: Path
    """Folder that holds the videos."""
    annotations: Path
    """Folder with `labels.json`, `train.json`, `validation.json` (or the older names, the same
    with `something-something-v2-` before them)."""
    judged: Literal["validation", "test"] = "validation"
    """Split that scores are taken on; `test` needs `test.json` and its answers, a file
    `test-answers.csv` of lines `id;class in words`."""


class CsvData(Section):
    """Videos listed in text files, one `path label` per line, as the Kinetics lists are."""

    kind: Literal["csv"]
    """`csv`: one file per split; a line is a video's path, the delimiter, its class number."""
    train: Path
    """File with the training videos."""
    validation: Path
    """File with the validation videos."""
    videos: Path | None = None
    """Folder that relative paths in the files start from; the folder of the file by default."""
    delimiter: str = Field(default=" ", min_length=1)
    """What stands between path and label; the last one of a line counts, so paths may have it."""


class FolderData(Section):
    """Videos or pictures in one folder per class, as ImageNet lies on disk."""

    kind: Literal["folders"]
    """`folders`: SPLIT/CLASS/file; classes are numbered by the alphabet of the training folders."""
    train: Path
    """Folder of the training classes."""
    validation: Path
    """Folder of the validation classes; each must be one of training."""


class ShardData(Section):
    """Datasets that `jepa prep run` made, whose samples carry their class."""

    kind: Literal["shards"]
    """`shards`: the class of a sample stands among the `labels` of its sidecar."""
    train: tuple[Path, ...] = Field(min_length=1)
    """Folders of the training datasets."""
    validation: tuple[Path, ...] = Field(min_length=1)
    """Folders of the validation datasets."""
    label: str = "label"
    """Name of the label that is the class; classes are numbered in the order of their names."""


class ClipConfig(Section):
    """How clips are cut from a video and which tokens of the encoder are used."""

    frames: int = Field(default=16, ge=1)
    """Frames of one segment, as many as the encoder takes at once."""
    frame_step: int | None = Field(default=None, ge=1)
    """Take every n-th frame of the video; use this or `fps`. The published SSv2 probe: 4."""
    fps: float | None = Field(default=None, gt=0)
    """Take this many frames per second whatever rate the video has; use this or `frame_step`."""
    segments: int = Field(default=1, ge=1)
    """Parts of the video that are encoded one by one; their tokens are joined along time."""
    views: int = Field(default=3, ge=1, le=3)
    """Square crops along the longer side in validation, whose class probabilities are averaged:
    1 takes the centre, 3 both ends and the centre."""
    resolution: int = Field(default=256, ge=16)
    """Height and width in pixels of what the encoder sees."""
    cells: int = Field(default=1, ge=1)
    """Bands along height and along width in which pooled heads average tokens apart, for the
    pooling `cells`; 3 keeps 3 × 3 places, and nine times the numbers."""
    layers: tuple[int, ...] = ()
    """Encoder layers, counted from 0, whose normalised tokens are joined; none: the last."""
    frame_order: Literal["forward", "shuffled", "reversed"] = "forward"
    """Order in which the encoder sees the frames of a segment, in training as in validation.
    `shuffled` puts them into an order drawn for each video: what is left of a score then comes
    from single pictures, what is lost came from motion."""

    @model_validator(mode="after")
    def _one_rate(self) -> "ClipConfig":
        if (self.frame_step is None) == (self.fps is None):
            raise ValueError("expected exactly one of `frame_step` and `fps`")
        if self.views == 2:
            raise ValueError("expected views 1 (centre) or 3 (both ends and the centre), got 2")
        return self


class SweepConfig(Section):
    """How heads are fitted: all pairs of a learning rate and a weight decay train at once."""

    learning_rates: tuple[float, ...] = Field(default=(1e-3,), min_length=1)
    """Peak learning rates of the sweep; each falls to 0 along a cosine, without warm-up."""
    weight_decays: tuple[float, ...] = Field(default=(0.01,), min_length=1)
    """AdamW weight decays of the sweep, on all parameters of a head."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training clips."""
    batch: int = Field(default=256, ge=1)
    """Clips per update."""
    clips_at_once: int | None = Field(default=None, ge=1)
    """Clips that a head computes at once; gradients of an update are summed over them, so scores
    are the same but for rounding. Lower it where a GPU's memory is full; all of `batch` by
    default."""


class AttentiveConfig(SweepConfig):
    """The attentive probe: self-attention over all tokens, then one learned query."""

    blocks: int = Field(default=4, ge=1)
    """Blocks in total; the last one is the cross-attention. The published probe has 4."""
    attention_heads: int = Field(default=16, ge=1)
    """Attention heads of each block; must divide the encoder's width."""


class LinearConfig(SweepConfig):
    """One linear layer on pooled, standardised tokens."""

    pooling: Pooling = "time"
    """`time` averages the tokens of each time step and keeps the steps apart; `clip` averages
    over everything, which cannot tell a movement from its reverse; `cells` keeps steps and the
    places of `clip.cells` apart. Rotary positions are relative: a token hardly says where it
    stands, so where a small encoder is to tell left from right, the head must keep the places."""


class KnnConfig(Section):
    """Weighted vote of the nearest training clips by cosine of their pooled tokens."""

    k: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour's weight is exp(cosine / temperature)."""
    pooling: Pooling = "time"
    """As for the linear head."""


class RandAugment(Section):
    """Random changes of colour and geometry, the same in all frames of a segment.

    The defaults are the published `rand-m7-n4-mstd0.5-inc1`.
    """

    operations: int = Field(default=4, ge=1)
    """Operations drawn for a segment, with replacement."""
    magnitude: float = Field(default=7.0, ge=0, le=10)
    """How strong they are; 10 is a turn by 30 degrees, a shift by 45 % of the picture."""
    deviation: float = Field(default=0.5, ge=0)
    """Standard deviation of the magnitude from one operation to the next."""
    probability: float = Field(default=0.5, ge=0, le=1)
    """How often an operation that was drawn is carried out."""


class Augmentation(Section):
    """What varies in the training clips of the attentive head; any of it encodes every epoch."""

    random_crop: bool = False
    """Cut a random rectangle of 8 to 100 % of the picture instead of the centre square."""
    random_time: bool = False
    """Start a segment at a random frame where the video is longer than the segment."""
    rand_augment: RandAugment | None = None
    """Change colour and geometry of whole frames, before they are cut; `{}` for the published
    settings."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that one rectangle of a clip is replaced by noise in all frames."""

    @property
    def varies(self) -> bool:
        """True if two passes over the training clips can differ."""
        drawn = self.random_crop or self.random_time or self.rand_augment is not None
        return drawn or self.erase > 0


class TaskConfig(Section):
    """A probe task: labelled videos, the clips cut from them, and the heads."""

    keys_are_in: ClassVar[str] = "`jepa config schema --of probe` lists every key"
    has_shipped_files: ClassVar[bool] = False

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name of the task; part of the names of its result files."""
    data: Annotated[SsV2Data | CsvData | FolderData | ShardData, Field(discriminator="kind")]
    """Where the labelled videos are."""
    clip: ClipConfig
    """Which frames and crops the encoder sees."""
    attentive: AttentiveConfig = AttentiveConfig()
    """The attentive head."""
    linear: LinearConfig = LinearConfig(
        learning_rates=(1e-2, 1e-3), weight_decays=(1e-3, 0.1), epochs=50
    )
    """The linear head."""
    knn: KnnConfig = KnnConfig()
    """The nearest neighbours."""
    augmentation: Augmentation = Augmentation()
    """What varies between passes; none by default, so that features are encoded once."""
    selection: Literal["heldout", "validation"] = "heldout"
    """Which choice of the best of a sweep gives the task's score; both are reported. `heldout`
    chooses on training clips that were held out and looks at validation once. `validation` takes
    the best head and epoch on validation itself, as published figures are: comparable with them,
    but too high by the luck of the best of many."""
    heldout_share: float = Field(default=0.2, ge=0, lt=1)
    """Part of the training clips that is held out to choose the head; with 0, as published, all are
    fitted on and only the choice on validation is reported."""
    max_train: int | None = Field(default=None, ge=2)
    """Use at most this many training videos, drawn evenly over the classes; for quick runs."""
    max_validation: int | None = Field(default=None, ge=1)
    """Use at most this many validation videos, drawn evenly over the classes."""
    max_bad_share: float = Field(default=0.01, ge=0, lt=1)
    """Share of a split's videos that may be missing or undecodable before the probe stops."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of encoder and heads on a GPU; a CPU always computes in fp32."""
    encode_batch: int = Field(default=8, ge=1)
    """Videos encoded at once."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads that decode videos ahead of the encoder."""
    tokens: Literal["auto", "cache", "encode"] = "auto"
    """Where the attentive head's tokens come from: `cache` keeps them on disk, in bf16, whatever
    their size; `encode` encodes every clip again in every epoch; `auto` keeps them where they fit
    `token_cache_gib` and reading is estimated to be faster. Pooled features are always kept."""
    token_cache_gib: float = Field(default=8.0, ge=0)
    """The most that `tokens: auto` keeps of a split."""

    @model_validator(mode="after")
    def _can_choose(self) -> "TaskConfig":
        if self.selection == "heldout" and self.heldout_share == 0:
            raise ValueError("`selection: heldout` needs a heldout_share above 0")
        return self
