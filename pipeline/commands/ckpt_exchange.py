"""`jepa ckpt import` and `jepa ckpt export`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.commands import JsonFlag, print_json
from pipeline.errors import UsageError
from pipeline.exchange.heads import read_head
from pipeline.exchange.hf_import import read_hf
from pipeline.exchange.layout import Networks
from pipeline.exchange.official import read_official
from pipeline.exchange.open import open_networks
from pipeline.exchange.sizes import Heads
from pipeline.exchange.source import ImportOptions
from pipeline.exchange.transfer import (
    Exported,
    ExportRequest,
    export_networks,
    import_networks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportFlags:
    """What the source does not tell."""

    heads: PositiveInt | None = None
    """Encoder heads, for sizes that have no name."""
    predictor_heads: PositiveInt | None = None
    """Predictor heads, for widths other than 384."""
    positions: Literal["rope", "sincos"] = "rope"
    """`sincos` for checkpoints of V-JEPA 1, whose position tables are compared with ours."""
    frames: PositiveInt | None = None
    """Frames of the clips that it was trained on last."""
    resolution: PositiveInt | None = None
    """Height and width in pixels of those clips."""
    force: Annotated[bool, Parameter(negative="")] = False
    """Replace an earlier import of this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFlags:
    """What is exported, and what is said of it."""

    step: int | None = None
    """Step of a run; the newest that is whole by default."""
    weights: Literal["teacher", "student"] = "teacher"
    """The averaged teacher, as evaluations use, or the student."""
    frames: PositiveInt | None = None
    """Clip length to name; that of the last stage by default."""
    resolution: PositiveInt | None = None
    """Clip size in pixels, which fixes transformers' positions; the last stage's by default."""
    license: str | None = None
    """Licence of the weights, for the card's front matter."""
    check: Annotated[bool, Parameter(negative="--no-check")] = True
    """Compare with transformers after an hf export, where it is installed."""
    head: Path | None = None
    """An attentive head to go with it (a file of `jepa probe --save-head`, for instance), which
    makes an hf export a VJEPA2ForVideoClassification."""
    force: Annotated[bool, Parameter(negative="")] = False
    """Replace an earlier export of this name."""


def import_(
    source: Path,
    out: Path,
    /,
    *,
    format: Literal["vjepa2", "hf"],
    flags: Annotated[ImportFlags | None, Parameter(name="*")] = None,
    json: JsonFlag = False,
) -> None:
    """Read an official checkpoint or a folder of transformers into an exchange folder.

    OUT is what `jepa train … init_from=OUT`, `jepa probe OUT` and `jepa ckpt export OUT` take.
    Nothing is left out silently: a tensor that is missing, unknown or of another shape ends the
    import. A pickle that holds more than tensors and plain values is refused unread.

    Args:
        source: An official .pt file, or a folder with config.json and safetensors.
        out: The exchange folder to make.
        format: `vjepa2` for official .pt files, `hf` for folders of transformers' VJEPA2Model.
        flags: What the source does not tell.
        json: Print the result as JSON.
    """
    asked = flags or ImportFlags()
    options = ImportOptions(
        heads=Heads(encoder=asked.heads, predictor=asked.predictor_heads),
        positions=asked.positions,
        frames=asked.frames,
        resolution=asked.resolution,
    )
    if format == "hf" and (asked.heads or asked.predictor_heads):
        raise UsageError("--heads and --predictor-heads: config.json tells them already")
    read = {"vjepa2": read_official, "hf": read_hf}[format]
    found = _reading(source, lambda: read(source, options))
    with _Shown("import") as report:
        exchange = import_networks(found, out, force=asked.force, report=report)
    if json:
        print_json({"path": str(out), **exchange.model_dump(mode="json")})
        return
    console = Console(highlight=False, soft_wrap=True)
    _describe(console, exchange.networks)
    for note in found.notes:
        console.print(f"  {note}", markup=False)
    console.print(f"{out}: {exchange.digest[:16]}", markup=False)


def export(
    source: Path,
    out: Path,
    /,
    *,
    format: Literal["hf", "safetensors", "vjepa2"],
    flags: Annotated[ExportFlags | None, Parameter(name="*")] = None,
    json: JsonFlag = False,
) -> None:
    """Write encoder and predictor for others to read, with a model card.

    Args:
        source: A run, one of its checkpoints, an exchange folder, or a folder of transformers.
        out: The folder to make.
        format: `hf` loads with AutoModel and AutoVideoProcessor, `safetensors` is an exchange
            folder, `vjepa2` an official checkpoint file.
        flags: What is exported, and what is said of it.
        json: Print the result as JSON.
    """
    asked = flags or ExportFlags()
    request = ExportRequest(
        format=format,
        weights=asked.weights,
        frames=asked.frames,
        resolution=asked.resolution,
        force=asked.force,
        check=asked.check,
        license=asked.license,
        head=None if asked.head is None else read_head(asked.head),
    )
    found = _reading(source, lambda: open_networks(source, asked.step))
    with _Shown("export") as report:
        exported = export_networks(found, out, request, report)
    if json:
        print_json(_document(exported))
        return
    console = Console(highlight=False, soft_wrap=True)
    _describe(console, exported.networks)
    for note in (*exported.notes, _difference_words(exported, request)):
        console.print(f"  {note}", markup=False)
    console.print(str(out), markup=False)


class _Shown:
    """A bar on standard error for the tensors of a transfer."""

    def __init__(self, what: str) -> None:
        self._what = what
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        bar = self._progress.add_task(f"{self._what}: tensors")
        return lambda done, total: self._progress.update(bar, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _reading(source: Path, read: Callable[[], Any]) -> Any:
    with Console(stderr=True, highlight=False).status(f"reading and verifying {source}"):
        return read()


def _describe(console: Console, networks: Networks) -> None:
    dims, predictor = networks.encoder.dims, networks.predictor
    console.print(
        f"encoder: width {dims.width}, {dims.depth} blocks, {dims.heads} heads, MLP "
        f"{dims.mlp_hidden} ({networks.encoder_is})",
        markup=False,
    )
    if predictor is None:
        console.print("predictor: none")
        return
    narrow = predictor.dims
    console.print(
        f"predictor: width {narrow.width}, {narrow.depth} blocks, {narrow.heads} heads, "
        f"{predictor.num_mask_tokens} mask tokens",
        markup=False,
    )


def _difference_words(exported: Exported, request: ExportRequest) -> str:
    if exported.difference is not None:
        found = exported.difference
        return (
            f"transformers {found.transformers} loads it strictly; largest difference: encoder "
            f"{found.encoder:.2e}, predictor {found.predictor:.2e}"
            + ("" if found.logits is None else f", logits {found.logits:.2e}")
        )
    if request.format == "hf" and request.check:
        return "not compared: transformers 5 or newer is not installed here"
    return "not compared with transformers"


def _document(exported: Exported) -> dict[str, Any]:
    difference = exported.difference
    return {
        "path": str(exported.path),
        "networks": exported.networks.model_dump(mode="json"),
        "difference": None if difference is None else asdict(difference),
        "notes": list(exported.notes),
    }
