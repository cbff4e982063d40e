"""What a checkpoint remembers of the data, and whether a resumed run may go on with it.

The position itself is a function of the step, so nothing of the loader's state is saved. What is
saved is the identity of everything the order of clips depends on: if it differs at a resume, the
same step would show other clips, and the run refuses instead of training on silently.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from pipeline.data.format import SCHEMA_VERSION, ShardIndex
from pipeline.data.settings import DataConfig
from pipeline.errors import CheckpointError

ORDER_VERSION = 1
"""Raised when `order.py`, `sampling.py` or the crop's draw would give other clips than before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIdentity:
    """One dataset of the mixture; `path` is told in messages but may change."""

    path: str
    digest: str
    index_sha256: str
    num_samples: int
    weight: float
    weights_sha256: str | None = None
    """Of the weights that its samples are drawn by, if they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """Everything that decides which clip, cut how, stands at a step."""

    schema_version: int
    order_version: int
    seed: int
    global_batch: int
    mixture_block: int
    sampling: str
    crop_scale: tuple[float, float]
    crop_aspect_ratio: tuple[float, float]
    horizontal_flip: float
    antialias: bool
    max_substitutes: int
    sources: tuple[SourceIdentity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave, after a round trip through JSON.

        Raises:
            CheckpointError: Fields are missing or unknown.
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in saved.items()
        }
        try:
            values["sources"] = tuple(SourceIdentity(**source) for source in saved["sources"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint's description of its data cannot be read: {error}",
                remedy="It was written by another version of jepa: resume with that version.",
            ) from error


def data_identity(
    config: DataConfig, datasets: Sequence[ShardIndex], *, seed: int, global_batch: int
) -> DataIdentity:
    """The identity of a run's data, to be saved with each of its checkpoints.

    Args:
        config: The run's data section.
        datasets: Its opened sources, from `clips.open_sources`.
        seed: The run's seed.
        global_batch: Clips per optimiser step.
    """
    return DataIdentity(
        schema_version=SCHEMA_VERSION,
        order_version=ORDER_VERSION,
        seed=seed,
        global_batch=global_batch,
        mixture_block=config.mixture_block,
        sampling=config.sampling,
        crop_scale=config.crop_scale,
        crop_aspect_ratio=config.crop_aspect_ratio,
        horizontal_flip=config.horizontal_flip,
        antialias=config.antialias,
        max_substitutes=config.max_substitutes,
        sources=tuple(
            SourceIdentity(
                path=source.path,
                digest=dataset.digest,
                index_sha256=dataset.manifest.index_sha256,
                num_samples=len(dataset),
                weight=source.weight,
                weights_sha256=dataset.manifest.weights_sha256 if source.sample_weights else None,
            )
            for source, dataset in zip(config.sources, datasets, strict=True)
        ),
    )


def check_same(
    saved: DataIdentity, current: DataIdentity, *, allow_dataset_change: bool = False
) -> tuple[str, ...]:
    """Make sure that a resumed run goes on with the data it was begun with.

    Args:
        saved: From the checkpoint.
        current: From the configuration and the datasets as they are now.
        allow_dataset_change: Go on in spite of differences; the run is then no longer the one
            that an uninterrupted start would have given.

    Returns:
        The differences, one sentence each; empty if there are none.

    Raises:
        CheckpointError: There are differences and they are not allowed.
    """
    differences = (*_setting_differences(saved, current), *_source_differences(saved, current))
    if differences and not allow_dataset_change:
        raise CheckpointError(
            "the checkpoint was trained on other data than the configuration names now:\n"
            + "\n".join(f"  - {difference}" for difference in differences),
            remedy="Put the data section and the datasets back as they were, start a new run under "
            "another name, or go on in spite of it: `jepa resume RUN --allow-dataset-change`.",
        )
    return differences


def _setting_differences(saved: DataIdentity, current: DataIdentity) -> list[str]:
    differences = []
    for field in fields(DataIdentity):
        was, now = getattr(saved, field.name), getattr(current, field.name)
        if field.name != "sources" and was != now:
            differences.append(f"{field.name} was {was}, is {now}")
    return differences


def _source_differences(saved: DataIdentity, current: DataIdentity) -> list[str]:
    if len(saved.sources) != len(current.sources):
        return [
            f"there were {len(saved.sources)} sources, are {len(current.sources)}: "
            f"{_paths(saved)} became {_paths(current)}"
        ]
    if sorted(map(_content, saved.sources)) == sorted(map(_content, current.sources)) and list(
        map(_content, saved.sources)
    ) != list(map(_content, current.sources)):
        return [f"the order of the sources changed: {_paths(saved)} became {_paths(current)}"]
    return [
        f"source {number} ({now.path}): {difference}"
        for number, (was, now) in enumerate(zip(saved.sources, current.sources, strict=True))
        for difference in _one_source_differences(was, now)
    ]


def _one_source_differences(was: SourceIdentity, now: SourceIdentity) -> Iterator[str]:
    if was.weight != now.weight:
        yield f"weight was {was.weight}, is {now.weight}"
    if was.weights_sha256 != now.weights_sha256:
        alike = was.weights_sha256 is None
        again = "; its sample_weights: false draws them as before" if alike else ""
        yield f"its samples were drawn {_drawn(was)}, are drawn {_drawn(now)}{again}"
    if was.num_samples != now.num_samples:
        yield f"had {was.num_samples} samples, has {now.num_samples}"
    elif was.index_sha256 != now.index_sha256:
        yield "its index has other samples, or in another order"
    elif was.digest != now.digest:
        yield "its shards have other bytes behind the same index"


def _drawn(source: SourceIdentity) -> str:
    if source.weights_sha256 is None:
        return "all alike"
    return f"by the weights {source.weights_sha256[:12]}"


def _content(source: SourceIdentity) -> tuple[str, float, str]:
    return source.digest, source.weight, source.weights_sha256 or ""


def _paths(identity: DataIdentity) -> str:
    return ", ".join(source.path for source in identity.sources)
