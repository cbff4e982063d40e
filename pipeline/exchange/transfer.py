"""Networks into a new folder: as exchange, for transformers, or in the official layout."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.exchange.card import CARD_FILE, CardFacts, card
from pipeline.exchange.difference import Difference, measure
from pipeline.exchange.heads import HeadWeights, hf_head_config, hf_head_tensors
from pipeline.exchange.hf_export import (
    CONFIG_FILE,
    PROCESSOR_FILE,
    WEIGHTS_INDEX,
    hf_config,
    inexpressible,
    write_hf,
)
from pipeline.exchange.layout import EXCHANGE_FILE, WEIGHTS_STEM, Exchange, Networks, write_exchange
from pipeline.exchange.names import official_recipe
from pipeline.exchange.source import Source
from pipeline.exchange.tensors import Tensors, joined, write_safetensors
from pipeline.exchange.training import training_facts
from pipeline.files import publish, sync_file, sync_folder

Format = Literal["hf", "safetensors", "vjepa2"]
Which = Literal["teacher", "student"]
OFFICIAL_FILE = "checkpoint.pt"
# Everything that imports, exports and probes of them put into a folder, beside safetensors.
_WEIGHTS = ".safetensors"
_MARKERS = (EXCHANGE_FILE, CONFIG_FILE, OFFICIAL_FILE)
_MADE_HERE = frozenset({*_MARKERS, CARD_FILE, PROCESSOR_FILE, WEIGHTS_INDEX, "probes"})
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What is to be written."""

    format: Format
    weights: Which = "teacher"
    """Whose encoder stands in the export."""
    frames: int | None = None
    """Clip length to name; that of the source otherwise."""
    resolution: int | None = None
    """Clip size to name, which fixes transformers' positions; that of the source otherwise."""
    force: bool = False
    """Replace an earlier export of this name."""
    check: bool = True
    """Compare with transformers, where it is installed and can load the format."""
    license: str | None = None
    """Licence for the card."""
    head: HeadWeights | None = None
    """An attentive head to go with it, which makes the export a classifier; `hf` alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    networks: Networks
    difference: Difference | None
    notes: tuple[str, ...]


def import_networks(source: Source, out: Path, *, force: bool, report: Report) -> Exchange:
    """Writes an exchange folder.

    Raises:
        UsageError: `out` exists, and is not to be replaced.
        CheckpointError: A weight is not finite.
        StorageError: It cannot be written.
    """
    with new_folder(out, source, force=force) as folder:
        home = write_safetensors(folder, WEIGHTS_STEM, _counted(source.tensors, report))
        told = {**source.provenance, "notes": list(source.notes)}
        return write_exchange(folder, source.networks, told, sorted(set(home.values())))


def export_networks(source: Source, out: Path, request: ExportRequest, report: Report) -> Exported:
    """Writes a folder that others read, with a model card.

    Args:
        source: Any networks that were opened.
        out: The folder to make.
        request: Format, whose weights, and what to say of clips.
        report: Told tensors written and their total.

    Raises:
        UsageError: `out` exists, or the clip's size is not known.
        CheckpointError: The format cannot express these networks, or a weight is not finite.
        ConfigError: The clip cannot be cut into whole tokens.
        StorageError: It cannot be written.
    """
    networks, notes = _chosen(source, request)
    if request.format == "vjepa2" and not source.has_teacher:
        notes += ("`target_encoder` is a copy of `encoder`: the source holds one encoder",)
    config = _config(networks, request)
    training = training_facts(source)
    notes = (*source.notes, *notes)
    told = {**source.provenance, "notes": list(notes), "training": training}
    with new_folder(out, source, force=request.force) as folder:
        difference = None
        if request.format == "vjepa2":
            _write_official(folder, source, report)
        else:
            tensors = _tensors(source, request.weights)
            counted = _counted(tensors, report)
            if config is not None:
                head = request.head and hf_head_tensors(request.head)
                write_hf(folder, config, counted, head)
            else:
                home = write_safetensors(folder, WEIGHTS_STEM, counted)
                write_exchange(folder, networks, told, sorted(set(home.values())))
            if config is not None and request.check:
                difference = measure(folder, networks, tensors, request.head)
        facts = CardFacts(
            name=out.resolve().name,
            networks=networks,
            weights=request.weights,
            format=request.format,
            license=request.license,
            difference=difference,
            checked=request.check,
            provenance=source.provenance,
            notes=notes,
            training=training,
        )
        (folder / CARD_FILE).write_text(card(facts), encoding="utf-8")
    return Exported(path=out, networks=networks, difference=difference, notes=notes)


@contextmanager
def new_folder(out: Path, source: Source, *, force: bool) -> Iterator[Path]:
    """A folder under another name that becomes `out` when the block ends without an error.

    Raises:
        UsageError: `out` exists and may not be replaced: it is the source, or holds anything that
            no import or export makes.
        StorageError: The file system refuses.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - `.` has no name; links stay as they are
    _check_free(out, source, force=force)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            sync_file(path)
        sync_folder(partial)
        _replace(partial, out)
    except OSError as error:
        where = error.filename or out
        raise StorageError(f"Cannot write {where}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_free(out: Path, source: Source, *, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out} exists already.", remedy="Choose another OUT, or add --force.")
    if reason := _precious(out, source):
        raise UsageError(
            f"{out} {reason}: --force would remove it.",
            remedy="Choose another OUT, or remove it yourself.",
        )


def _precious(out: Path, source: Source) -> str | None:
    """Why a path is not replaced even where that is asked for."""
    if out.is_symlink() or not any((out / name).is_file() for name in _MARKERS):
        return "is no import or export"
    read = [Path(str(source.provenance.get(key, ""))) for key in ("source", "exchange")]
    if any(path.resolve() == out.resolve() for path in read):
        return "is what is read from"
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name not in _MADE_HERE and not name.endswith(_WEIGHTS)]
    return f"holds {', '.join(others[:5])}, which no import or export makes" if others else None


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        publish(partial, out)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        publish(partial, out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _chosen(source: Source, request: ExportRequest) -> tuple[Networks, tuple[str, ...]]:
    """The networks as exported, and what has to be said of the choice."""
    networks, notes = source.networks, ()
    role = networks.encoder_is
    if source.has_teacher:
        role = request.weights
    elif role == "unknown":
        notes = ("the source holds one encoder; it does not say whether it is the averaged one",)
    elif role != request.weights:
        raise CheckpointError(
            f"The source holds the {role}'s weights alone, the {request.weights}'s were asked for.",
            remedy=f"Export with --weights {role}.",
        )
    changes = {
        "encoder_is": role,
        "frames": request.frames or networks.frames,
        "resolution": request.resolution or networks.resolution,
    }
    return networks.model_copy(update=changes), notes


def _config(networks: Networks, request: ExportRequest) -> dict[str, Any] | None:
    """Transformers' config.json, if that is the format.

    Raises:
        UsageError: A head is to go into another format.
        CheckpointError: The format cannot express these networks.
    """
    wanted, head = request.format, request.head
    if wanted == "hf":
        frames, resolution = _clip(networks)
        config = hf_config(networks, frames=frames, resolution=resolution)
        return config if head is None else {**config, **hf_head_config(head, networks)}
    if head is not None:
        raise UsageError(f"a head goes into an export with --format hf, not {wanted}")
    if wanted == "vjepa2" and (reasons := inexpressible(networks)):
        raise CheckpointError(
            f"V-JEPA 2's own code cannot express these networks: {'; '.join(reasons)}.",
            remedy="Export them with --format safetensors.",
        )
    return None


def _clip(networks: Networks) -> tuple[int, int]:
    if networks.frames is None or networks.resolution is None:
        raise UsageError(
            "The source does not say what clips the networks were trained on.",
            remedy="Give --frames and --resolution, as 64 and 256 for fpc64-256.",
        )
    return networks.frames, networks.resolution


def _tensors(source: Source, weights: Which) -> Tensors:
    predictor = source.tensors.below("predictor.").above("predictor.")
    return joined(source.encoder(weights).above("encoder."), predictor)


def _write_official(folder: Path, source: Source, report: Report) -> None:
    """Networks as the official trainer saves them; its own readers take them strictly."""
    content: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _counted(source.tensors, report):
        network, _, _ = name.partition(".")
        key = "target_encoder" if network == "teacher" else network
        for part, piece in official_recipe(name, tuple(tensor.shape)).split(tensor):
            inner = part.partition(".")[2]
            content.setdefault(key, {})[f"module.backbone.{inner}"] = piece.clone()
    # The official evaluation reads `target_encoder`, its hub entry points `encoder`.
    content.setdefault("target_encoder", content["encoder"])
    try:
        torch.save(content, folder / OFFICIAL_FILE)
    except RuntimeError as error:  # how torch's zip writer words a full disk
        reason = str(error).splitlines()[0]
        raise StorageError(f"Cannot write {folder / OFFICIAL_FILE}: {reason}") from error


def _counted(tensors: Tensors, report: Report) -> Iterator[tuple[str, Tensor]]:
    for number, named in enumerate(tensors.finite()):
        report(number, len(tensors.shapes))
        yield named
    report(len(tensors.shapes), len(tensors.shapes))
