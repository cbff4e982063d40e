"""The exchange folder: networks without a run, that training, probes and exports all take.

OUT/exchange.json            what the networks are, where they are from, every file's digest
OUT/weights….safetensors     `encoder.*`, perhaps `teacher.*`, perhaps `predictor.*`
OUT/README.md                the model card, where there is one
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.config.section import Section
from pipeline.errors import CheckpointError
from pipeline.exchange.tensors import read_json
from pipeline.files import sha256_of
from pipeline.models.attention import AttentionConfig
from pipeline.models.encoder import EncoderConfig
from pipeline.models.predictor import PredictorConfig

EXCHANGE_FILE = "exchange.json"
WEIGHTS_STEM = "weights"
SCHEMA_VERSION = 1
# Settings of networks that say how they are computed or trained, not what their weights mean.
NOT_IN_WEIGHTS = frozenset(
    {"backend", "rope_precision", "mask_token_per_mask", "depth_scaled_init"}
)
Role = Literal["student", "teacher", "unknown"]


class FileDigest(Section):
    """One file of weights."""

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in the folder."""
    num_bytes: int
    """Size."""
    sha256: str
    """Hex SHA-256 of the content."""


class Networks(Section):
    """Sizes and settings without which weights mean nothing."""

    encoder: EncoderConfig
    """Size of the encoder."""
    predictor: PredictorConfig | None = None
    """Size of the predictor; none if only an encoder is known."""
    attention: AttentionConfig = AttentionConfig()
    """How tokens know their place; the kernel named in it does not matter."""
    encoder_is: Role = "unknown"
    """Whose weights stand under `encoder`: the student's, or the averaged teacher's."""
    frames: int | None = Field(default=None, gt=0)
    """Frames of the clips seen last in training, where that is known."""
    resolution: int | None = Field(default=None, gt=0)
    """Height and width of those clips in pixels, where that is known."""


class Exchange(Section):
    """The content of exchange.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Raised when older readers would misunderstand the folder."""
    networks: Networks
    """What the weights are."""
    provenance: dict[str, Any]
    """Where they are from: source, its format and digest, and what was decided on the way."""
    files: tuple[FileDigest, ...] = Field(strict=False)
    """The files of weights."""
    digest: str
    """SHA-256 over networks and files: two folders with one digest are one model."""


def portable(attention: AttentionConfig) -> AttentionConfig:
    """The same positions with the kernel that every machine has; results are the same."""
    return attention.model_copy(update={"backend": "sdpa"})


def is_exchange(path: Path) -> bool:
    """Whether a path is an exchange folder."""
    return (path / EXCHANGE_FILE).is_file()


def write_exchange(
    folder: Path, networks: Networks, provenance: Mapping[str, Any], weight_files: list[str]
) -> Exchange:
    """Writes exchange.json beside weights that are there already."""
    files = tuple(
        FileDigest(
            path=name, num_bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name)
        )
        for name in weight_files
    )
    exchange = Exchange(
        networks=networks,
        provenance={"created": datetime.now(UTC).isoformat(timespec="seconds"), **provenance},
        files=files,
        digest=_digest(networks, files),
    )
    text = json.dumps(exchange.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / EXCHANGE_FILE).write_text(text + "\n", encoding="utf-8")
    return exchange


def read_exchange(folder: Path, *, verify: bool = True) -> Exchange:
    """Reads an exchange folder.

    Args:
        folder: The folder.
        verify: Compare every byte of its weights with its digest.

    Raises:
        CheckpointError: It is damaged, was changed, or another version of jepa wrote it.
    """
    path = folder / EXCHANGE_FILE
    raw = read_json(path)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {raw.get('schema_version')!r}; this jepa reads "
            f"{SCHEMA_VERSION}.",
            remedy="Import the source again with this jepa.",
        )
    try:
        exchange = Exchange.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(
            f"{path} cannot be read: {'; '.join(lines)}",
            remedy="Import the source again with this jepa.",
        ) from None
    files = exchange.files if verify else ()
    problems = [problem for file in files if (problem := _problem(folder, file))]
    if exchange.digest != _digest(exchange.networks, exchange.files):
        problems.append(f"{EXCHANGE_FILE} was changed: its digest differs")
    if problems:
        raise CheckpointError(
            f"{folder} is not whole: {'; '.join(problems)}",
            remedy="Copy or import it again.",
        )
    return exchange


def _digest(networks: Networks, files: tuple[FileDigest, ...]) -> str:
    told = [networks.model_dump(mode="json"), [file.sha256 for file in files]]
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _problem(folder: Path, file: FileDigest) -> str | None:
    path = folder / file.path
    if not path.is_file():
        return f"{file.path} is missing"
    if path.stat().st_size != file.num_bytes:
        return f"{file.path} has {path.stat().st_size} bytes, expected {file.num_bytes}"
    if sha256_of(path) != file.sha256:
        return f"{file.path} was changed: its digest differs"
    return None
