"""Where a probe is wrong: confusion, classes, and the clips it understands least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StorageError
from pipeline.report.charts import picture
from pipeline.report.html import Markup, figure, figures, folded, percent, section, table, text
from pipeline.track.folder import PROBE_PICTURES, read_json_object

_MOST_NAMED, _MOST_PAIRS, _MOST_HARD = 24, 8, 8
_PICTURE_PIXELS = 480


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeDetail:
    """The best head on the newest checkpoint of one task."""

    task: str
    step: int | None
    """None for weights whose origin does not tell a step."""
    which: str
    """The encoder: the teacher or the student."""
    stem: str
    """Name of its files."""
    class_names: tuple[str, ...]
    score: Mapping[str, Any]
    """One of the file's `scores`."""

    @property
    def rank(self) -> tuple[int, bool]:
        """Of two results on a task the higher is shown: the newest, of one step the teacher's."""
        return self.step or 0, self.which != "student"

    def counts(self) -> np.ndarray:
        """Clips by class and answer, int64 [C, C]."""
        counts = np.zeros((len(self.class_names),) * 2, dtype=np.int64)
        for truth, answer, num in self.score["confusion"]:
            counts[truth, answer] = num
        return counts


def probe_details(folder: Path) -> list[ProbeDetail]:
    """For every task the newest checkpoint's best head, of those results that tell confusion.

    Args:
        folder: `RUN/probes`, or the folder that `jepa probe --out` was given.

    Raises:
        StorageError: A file of the probe folder cannot be read.
    """
    newest: dict[str, ProbeDetail] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json_object(path)
        scores = [score for score in content.get("scores", []) if score.get("confusion")]
        if not scores:
            continue
        found = ProbeDetail(
            task=str(content["task"]),
            step=content.get("step"),
            which=str(content.get("which", "teacher")),
            stem=path.stem,
            class_names=tuple(str(name) for name in content["class_names"]),
            score=max(scores, key=lambda score: score["top1"]),
        )
        if found.task not in newest or found.rank > newest[found.task].rank:
            newest[found.task] = found
    return list(newest.values())


def confusion_section(folder: Path) -> str:
    """Confusion, classes and hardest clips of every task; nothing where no result tells them."""
    parts = [_detail(folder, detail) for detail in probe_details(folder)]
    if not parts:
        return ""
    lead = (
        "The best head on the newest checkpoint, on validation. Rows are what is to be seen, "
        "columns what the head says; each row adds up to all clips of its class."
    )
    return section("Where the probe is wrong", *parts, lead=lead)


def _detail(folder: Path, detail: ProbeDetail) -> str:
    score = detail.score
    of = "imported weights" if detail.step is None else f"step {detail.step}"
    of += ", student" if detail.which == "student" else ""
    title = (
        f"{detail.task}, {score['head']} head, {of}: {percent(score['top1'])} right "
        f"of {score['num_val']} clips"
    )
    counts_CC = detail.counts()
    named = len(detail.class_names) <= _MOST_NAMED
    drawn = _matrix(detail, counts_CC) if named else _dots(counts_CC)
    rows = [
        (one["name"], one["num_clips"], percent(one["num_right"] / max(1, one["num_clips"])))
        for one in sorted(
            score["per_class"], key=lambda one: one["num_right"] / max(1, one["num_clips"])
        )
    ]
    classes = table(("class, hardest first", "clips", "right"), rows)
    return (
        f"<h3>{text(title)}</h3>{drawn}{_pairs(detail, counts_CC)}"
        f"{folded('All classes', classes)}{_hardest(folder, detail)}"
    )


def _matrix(detail: ProbeDetail, counts_CC: np.ndarray) -> str:
    """A table whose cells are as dark as they are full."""
    shares_CC = counts_CC / np.maximum(1, counts_CC.sum(axis=1, keepdims=True))
    head = "".join(f"<th>{place}</th>" for place in range(1, len(counts_CC) + 1))
    rows = []
    for place, name in enumerate(detail.class_names):
        cells = "".join(
            _shaded(int(num), float(share), is_right=place == answer)
            for answer, (num, share) in enumerate(
                zip(counts_CC[place], shares_CC[place], strict=True)
            )
        )
        rows.append(f"<tr><td>{place + 1} {text(name)}</td>{cells}</tr>")
    return (
        f"<div class=scroll><table class=words1><thead><tr><th>class</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shaded(num: int, share: float, *, is_right: bool) -> str:
    colour = "--c1" if is_right else "--bad"
    style = f"background:color-mix(in srgb,var({colour}) {70 * share:.0f}%,transparent)"
    return f'<td style="{style}">{num or ""}</td>'


def _dots(counts_CC: np.ndarray) -> str:
    """As a picture, where names would not fit: dark is full, the diagonal is right."""
    shares_CC = counts_CC / np.maximum(1, counts_CC.sum(axis=1, keepdims=True))
    grey_CC = (255 * (1 - np.sqrt(shares_CC))).astype(np.uint8)
    zoom = max(1, _PICTURE_PIXELS // len(grey_CC))
    pixels = np.repeat(np.repeat(grey_CC, zoom, axis=0), zoom, axis=1)
    drawing = picture(np.stack([pixels] * 3, axis=-1), "confusion of classes, by their numbers")
    return figure(drawing, "confusion: one row per class, one column per answer")


def _pairs(detail: ProbeDetail, counts_CC: np.ndarray) -> str:
    wrong_CC = counts_CC.copy()
    np.fill_diagonal(wrong_CC, 0)
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:_MOST_PAIRS]
    rows = []
    for flat in order:
        truth, answer = np.unravel_index(flat, wrong_CC.shape)
        if wrong_CC[truth, answer]:
            of_class = counts_CC[truth].sum()
            names = detail.class_names[truth], detail.class_names[answer]
            rows.append((*names, f"{wrong_CC[truth, answer]} of {of_class}"))
    return table(("to be seen", "taken for", "clips"), rows, 2) if rows else ""


def _hardest(folder: Path, detail: ProbeDetail) -> str:
    strips = _pictures(folder / PROBE_PICTURES / f"{detail.stem}.npz")
    names = detail.class_names
    drawn, rows = [], []
    for clip in _clips(detail)[:_MOST_HARD]:
        told = (
            f"{clip['key']}: {names[clip['label']]}, taken for {names[clip['predicted']]} "
            f"({percent(clip['share'])} for the right class)"
        )
        strip = strips.get(str(clip["position"]))
        if strip is None:
            rows.append((Markup(text(told)),))
        else:
            drawn.append(figure(picture(np.concatenate(list(strip), axis=1), told), told))
    listed = table(("Hardest clips, without pictures",), rows) if rows else ""
    return (f"<h3>Hardest clips</h3>{figures(*drawn)}" if drawn else "") + listed


def _clips(detail: ProbeDetail) -> Sequence[Mapping[str, Any]]:
    return detail.score.get("hardest", [])


def _pictures(path: Path) -> dict[str, np.ndarray]:
    """Frames of clips by their place, uint8 [T, H, W, 3]; none where the file is not there."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}", remedy="Run the probe again.") from error
    return {name: one for name, one in found.items() if one.ndim == 4 and one.dtype == np.uint8}
