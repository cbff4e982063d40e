"""A fresh run that starts from weights it is given: everything else starts as in any run."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.section import Section
from pipeline.errors import CheckpointError, ConfigError, JepaError
from pipeline.exchange.layout import NOT_IN_WEIGHTS, Networks, portable
from pipeline.exchange.open import networks_of_run, open_networks
from pipeline.exchange.source import Source
from pipeline.exchange.tensors import Shape, Tensors
from pipeline.objectives import build_objective
from pipeline.objectives.base import BuildOptions
from pipeline.run import RunConfig
from pipeline.track.folder import update_run_info

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and a dry run only compares
    from pipeline.engine.zero import ZeroEngine

_TEACHER = "teacher."
_DIMS = ("width", "depth", "heads", "mlp_hidden")
_MAX_SHOWN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a run was started from, for run.json, the events and the report."""

    source: str
    """The path that was given."""
    format: str
    """Whose layout the weights first had: jepa, vjepa2 or hf."""
    digest: str | None
    """Of the weights, where the source has one."""
    source_step: int | None
    """Step of the weights, where the source tells."""
    teacher: str
    """Where the teacher's average is from."""
    fresh: tuple[str, ...]
    """Networks that the source lacks and that start untrained."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "fresh": list(self.fresh)}


def check_weights(config: RunConfig) -> None:
    """Whether the weights that a run is to start from are whole and fit it.

    Raises:
        UsageError: There is nothing at `init_from` that holds networks.
        CheckpointError: It is damaged.
        ConfigError: The run's networks are others; everything that differs is named.
    """
    if config.init_from is not None:
        _must_be_good(config, open_networks(config.init_from))


def open_initial(config: RunConfig) -> Source | None:
    """The weights that a fresh run starts from, if it is given any; every rank calls it.

    Rank 0 reads every byte and compares; the others trust it, and all end alike.

    Raises:
        JepaError: As `check_weights`; the same on all ranks.
    """
    if config.init_from is None:
        return None
    problem: list[JepaError | None] = [None]
    source = None
    if dist.get_rank() == 0:
        try:
            source = open_networks(config.init_from)
            _must_be_good(config, source)
        except JepaError as error:
            problem[0] = error
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]
    return source or open_networks(config.init_from, verify=False)


def load_initial(engine: "ZeroEngine", config: RunConfig, source: Source) -> Origin:
    """Gives a fresh engine the weights of `open_initial`; every rank calls it.

    Student and predictor get theirs, the teacher's average the source's average or, where it has
    none, the student's weights. The optimiser stays fresh.

    Raises:
        CheckpointError: The weights did not arrive where they belong.
    """
    path = config.init_from
    fresh = _fresh_networks(config, source.tensors)
    lacking = engine.load_weights(_Slices(source.tensors))
    strange = [name for name in lacking if not name.startswith((*fresh, _TEACHER))]
    if strange:
        raise CheckpointError(f"{path} did not give the weights {', '.join(strange[:5])}.")
    if engine.stale_copies():
        raise CheckpointError(f"{path} was read, but its weights did not arrive in the networks.")
    told = source.provenance
    origin = Origin(
        source=str(path),
        format=str(told["format"]),
        digest=told.get("digest") or told.get("sha256"),
        source_step=told.get("step"),
        teacher="from the source's average" if source.has_teacher else "a copy of the student",
        fresh=tuple(prefix.removesuffix(".") for prefix in fresh),
    )
    if dist.get_rank() == 0:
        update_run_info(config.run_dir, {"init_from": origin.to_dict()})
    return origin


class _Slices:
    """Whole tensors offered as the engine asks for them: runs of elements, fp32."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._last: tuple[str, Tensor] | None = None

    def shape_of(self, name: str) -> Shape | None:
        """Shape of a whole tensor; None if there is none of this name."""
        return self._tensors.shapes.get(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """[stop − start]: elements of a flattened tensor."""
        # The optimiser's copy and the network's ask one after the other.
        if self._last is None or self._last[0] != name:
            self._last = (name, self._tensors.read(name).float().flatten())
        return self._last[1][start:stop]


def _must_be_good(config: RunConfig, source: Source) -> None:
    _must_fit(config, source)
    for _ in source.tensors.finite():
        pass


def _must_fit(config: RunConfig, source: Source) -> None:
    wanted, given = _shapes_of_run(config), source.tensors.shapes
    fresh = (*_fresh_networks(config, source.tensors), _TEACHER)
    lines = _setting_differences(networks_of_run(config), source.networks)
    lines += [
        f"{name}: this run has {wanted[name]}, the weights {tuple(shape)}"
        for name, shape in given.items()
        if name in wanted and wanted[name] != tuple(shape)
    ]
    lines += [f"{name}: the weights lack it" for name in wanted if _is_gap(name, given, fresh)]
    lines += [
        f"{name}: this run has no place for it"
        for name in given
        if name not in wanted and not name.startswith(_TEACHER)
    ]
    if lines:
        shown = lines[:_MAX_SHOWN]
        shown += [f"… and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
        raise ConfigError(
            f"The weights of init_from={config.init_from} do not fit this run:\n  "
            + "\n  ".join(shown),
            remedy=f"Set {_sizes_to_set(source.networks)}; or start from other weights.",
        )


def _is_gap(name: str, given: Any, fresh: tuple[str, ...]) -> bool:
    return name not in given and not name.startswith(fresh)


def _shapes_of_run(config: RunConfig) -> dict[str, Shape]:
    options = BuildOptions(attention=portable(config.attention), checkpoint_activations=False)
    with torch.device("meta"):
        modules = build_objective(config.objective, options).modules()
    return {name: tuple(tensor.shape) for name, tensor in modules.state_dict().items()}


def _fresh_networks(config: RunConfig, tensors: Tensors) -> tuple[str, ...]:
    """Prefixes of networks of which the source has nothing; a teacher is a copy then."""
    names = {name.partition(".")[0] + "." for name in _shapes_of_run(config)}
    there = {name.partition(".")[0] + "." for name in tensors.shapes}
    return tuple(sorted(names - there - {_TEACHER}))


def _setting_differences(ours: Networks, given: Networks) -> list[str]:
    """Sizes by name, and settings that change what weights mean without changing a shape."""
    lines = _differences("objective.encoder", ours.encoder, given.encoder)
    if ours.predictor is not None and given.predictor is not None:
        lines += _differences("objective.predictor", ours.predictor, given.predictor)
    return lines + _differences("attention", ours.attention, given.attention)


def _differences(section: str, ours: Section, given: Section) -> list[str]:
    mine, theirs = _settings(ours), _settings(given)
    return [
        f"{section}.{key}: this run has {mine[key]}, the weights {theirs[key]}"
        for key in mine
        if mine[key] != theirs[key]
    ]


def _settings(section: Section) -> dict[str, Any]:
    """What decides a network: dimensions as they come out, not as they were written."""
    written = {key: getattr(section, key) for key in type(section).model_fields}
    dims = getattr(section, "dims", None)
    if dims is not None:
        written |= {"size": None, **{key: getattr(dims, key) for key in _DIMS}}
    return {key: value for key, value in written.items() if key not in NOT_IN_WEIGHTS}


def _sizes_to_set(given: Networks) -> str:
    dims = given.encoder.dims
    words = [f"attention.{key}={value}" for key, value in _settings(given.attention).items()]
    # Numbers, not the name of a size: those that a run has set beside the name would stay.
    words += [f"objective.encoder.{key}={getattr(dims, key)}" for key in _DIMS]
    words += [
        f"objective.encoder.patch_size={given.encoder.patch_size}",
        f"objective.encoder.tubelet_size={given.encoder.tubelet_size}",
    ]
    if given.predictor is not None:
        narrow = given.predictor
        words += [f"objective.predictor.{key}={getattr(narrow.dims, key)}" for key in _DIMS]
        words.append(f"objective.predictor.num_mask_tokens={narrow.num_mask_tokens}")
    return " ".join(words)
