"""The dataset's card: `README.md` beside the shards, for whoever finds the folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline.data.layout import REJECTED_NAME, Manifest
from pipeline.data.manifest import write_durably
from pipeline.errors import StorageError

CARD_NAME = "README.md"
TERMS_NAME = "TERMS.md"
_TITLES = {
    "source_seconds": "length of the sources [s]",
    "source_short_side": "short side of the sources [pixels]",
    "source_fps": "frame rate of the sources [1/s]",
    "seconds": "length of the samples [s]",
    "short_side": "short side of the samples [pixels]",
    "motion": "motion [grey levels of 255 a second]",
}
_NO_LICENCE = (
    "None was given. The videos keep the terms of where they come from: `source` in every "
    f"`KEY.json` names the file. What `{TERMS_NAME}` in this folder says stands here after the "
    "next `jepa prep run`."
)
_READING = """\
Plain WebDataset tars; any tool that reads those reads these:

```python
import webdataset

for sample in webdataset.WebDataset("{first}", shardshuffle=False):
    sample["__key__"], sample["mp4"], sample["json"]  # name, H.264 video, where it comes from
```

`index.npy` says where every member of every sample lies, so training reads any sample with one
`pread`: name this folder as `path` under `data.sources` of a configuration of `jepa train`.
`jepa prep lint .` compares everything with its digests, `jepa prep stats .` draws the histograms,
`jepa prep preview .` shows clips as a model gets them."""


def terms_of(dataset_dir: Path) -> str:
    """What `TERMS.md` says of where the videos come from and of their licences; else nothing.

    Raises:
        StorageError: It is there and cannot be read as text.
    """
    path = dataset_dir / TERMS_NAME
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path}: cannot be read as UTF-8 text: {error}", remedy="Correct or remove it."
        ) from error


def write_card(dataset_dir: Path, manifest: Manifest, rejected: Mapping[str, int]) -> None:
    """Writes the card of a finished dataset; the same dataset gives the same bytes.

    Args:
        dataset_dir: The dataset.
        manifest: Its manifest, with figures if it was prepared from videos.
        rejected: What was left out, number by reason.

    Raises:
        StorageError: The folder cannot be written, or its `TERMS.md` not be read.
    """
    text = card_text(manifest, rejected, terms_of(dataset_dir))
    write_durably(dataset_dir / CARD_NAME, text.encode())


def card_text(manifest: Manifest, rejected: Mapping[str, int], terms: str = "") -> str:
    """The card as Markdown.

    `terms` is where the videos come from and under which licences, in the words of who knows.
    """
    figures: Mapping[str, Any] = dict(manifest.figures)
    first = manifest.shards[0].name if manifest.shards else "shard-000000.tar"
    parts = [
        "# A dataset of video clips",
        _table(("what", "how many"), _amounts(manifest, figures)),
        "## How it was made",
        "By `jepa prep run` with these settings:" if manifest.preparation else "Indexed as found.",
        _table(("setting", "value"), [(k, _plain(v)) for k, v in manifest.preparation.items()]),
        "## What it holds",
        *_histograms(figures.get("histograms") or {}),
        "## What was left out",
        f"`{REJECTED_NAME}` names every source or part of one." if rejected else "Nothing.",
        _table(("reason", "number"), [(k, str(v)) for k, v in sorted(rejected.items())]),
        "## Sources and licences",
        terms.strip() or _NO_LICENCE,
        "## How to read it",
        _READING.format(first=first),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _amounts(manifest: Manifest, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = sum(shard.bytes for shard in manifest.shards)
    rows = [
        ("samples", f"{manifest.num_samples:,}"),
        ("hours", f"{manifest.hours:,.3f}"),
        ("shards", f"{len(manifest.shards):,}, {size / 2**20:,.1f} MiB together"),
        ("members of every sample", ", ".join(manifest.members)),
    ]
    if figures:
        rows += [
            ("sources", f"{figures['sources']:,}, of which {figures['sources_used']:,} are used"),
            ("hours of the sources", f"{figures['source_hours']:,.3f}"),
            ("codecs of the sources", _codecs(figures["source_codecs"])),
        ]
    return [*rows, ("digest", f"`{manifest.digest}`"), ("schema", str(manifest.schema_version))]


def _histograms(histograms: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, title in _TITLES.items():
        if name in histograms:
            edges, counts = histograms[name]["edges"], histograms[name]["counts"]
            ends = [f"to {edge:g}" for edge in edges[1:]] + ["and more"]
            rows = [
                (f"{low:g} {end}", str(count))
                for low, end, count in zip(edges, ends, counts, strict=True)
                if count
            ]
            parts.append(_table((title, "number"), rows))
    return parts or ["Not counted."]


def _codecs(codecs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in codecs.items())


def _plain(value: JsonValue) -> str:
    return "" if value is None else str(value)


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {_cell(right)} |" for left, right in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
