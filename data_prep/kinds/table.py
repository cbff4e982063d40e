"""Kind `table`: a CSV or Parquet manifest, read row by row, or batch by batch.

    path        path or address of the video; the only column that is needed (also: `url`)
    name        the source's name; by default the path, with #start-end where those are given
    start, end  seconds of the part to keep; the whole video where left out
    caption     text about the video, or about the part
    captions    the shard contract's list of captions as JSON text
    trajectory  path of a .npz or .h5 file with times, states and actions
    kind        `video`, `image` or `episode`

Every other column becomes a label of its name.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from data_prep.kinds.filelist import name_of
from data_prep.kinds.listing import (
    IMAGE_SUFFIXES,
    Listing,
    about_everything,
    base_name,
    joined,
    mistake,
    opened_file,
    parent_of,
    plain_labels,
    source_at,
    suffix_of,
)
from data_prep.records import Labels, Source, SourceKind
from pipeline.data.layout import Caption
from pipeline.errors import UsageError

_PATH_COLUMNS = ("path", "url")
_COLUMNS = {
    *_PATH_COLUMNS,
    *("name", "start", "end", "caption", "captions", "trajectory", "kind"),
}
_KINDS = ("video", "image", "episode")
_BATCH_ROWS = 4096
_CAPTIONS = TypeAdapter(tuple[Caption, ...])
_Row = Mapping[str, Any]


def sources(path: str, listing: Listing) -> Iterator[Source]:
    """The videos of a manifest, in its order; missing ones are told as others.

    Raises:
        UsageError: A row is not as documented.
    """
    base = listing.videos or parent_of(path)
    with opened_rows(path) as rows:
        for row, values in rows:
            source = _source(path, row, values, base, listing)
            if source is not None:
                yield source


def columns_of(path: str) -> tuple[str, ...]:
    """The names of a manifest's columns.

    Raises:
        UsageError: It has none called `path` or `url`.
    """
    if suffix_of(path) == ".parquet":
        with _parquet(path) as file:
            names = tuple(file.schema_arrow.names)
    else:
        with opened_file(path) as file:
            reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            names = tuple(next(reader, ()))
    if not set(names) & set(_PATH_COLUMNS):
        raise mistake(path, 1, "a column `path` or `url`", ", ".join(names))
    return names


@contextmanager
def opened_rows(path: str) -> Iterator[Iterator[tuple[int, _Row]]]:
    """The rows of a CSV file, numbered as an editor's lines, or of Parquet, numbered from 1."""
    columns_of(path)
    if suffix_of(path) == ".parquet":
        with _parquet(path) as file:
            yield _parquet_rows(file)
        return
    with opened_file(path) as file:
        yield _csv_rows(path, io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


def _csv_rows(path: str, text: io.TextIOWrapper) -> Iterator[tuple[int, _Row]]:
    reader = csv.DictReader(text, strict=True)
    try:
        for values in reader:
            expected = len(reader.fieldnames or ())
            if None in values or None in values.values():
                got = sum(value is not None for value in values.values())
                raise mistake(path, reader.line_num, f"{expected} columns", got)
            yield reader.line_num, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise mistake(path, reader.line_num + 1, "a row of CSV in UTF-8", str(error)) from error


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415 - large, and for one kind of table

    with opened_file(path) as file:
        try:
            opened = parquet.ParquetFile(file)
        except ArrowInvalid as error:
            raise mistake(path, None, "a Parquet file", str(error)) from error
        yield opened


def _parquet_rows(file: Any) -> Iterator[tuple[int, _Row]]:
    row = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        for values in batch.to_pylist():
            row += 1
            yield row, {name: None if _is_nan(one) else one for name, one in values.items()}


def _is_nan(value: object) -> bool:
    """Whether it is no number, as which some tools write a missing value of any column."""
    return isinstance(value, float) and math.isnan(value)


def _source(path: str, row: int, values: _Row, base: str, listing: Listing) -> Source | None:
    place = next((str(values[name]) for name in _PATH_COLUMNS if values.get(name)), "")
    if not place:
        raise mistake(path, row, "a path in the column `path`", place)
    span = _span(path, row, values)
    name = str(values.get("name") or name_of(place))
    if span is not None and not values.get("name"):
        name += f"#{span[0]:g}-{span[1]:g}"
    trajectory = values.get("trajectory")
    kind = _kind(path, row, values, place)
    if (kind == "episode") != bool(trajectory):
        raise mistake(path, row, "a trajectory where kind is episode, and only there", trajectory)
    return source_at(
        name,
        joined(base, place),
        listing,
        f"{base_name(path)}, row {row}",
        kind=kind,
        spans=None if span is None else (span,),
        labels=_labels(values) or None,
        captions=_captions(path, row, values, span),
        trajectory=joined(base, str(trajectory)) if trajectory else None,
    )


def _kind(path: str, row: int, values: _Row, place: str) -> SourceKind:
    kind = values.get("kind") or (
        "episode"
        if values.get("trajectory")
        else "image"
        if suffix_of(place) in IMAGE_SUFFIXES
        else "video"
    )
    if kind not in _KINDS:
        raise mistake(path, row, f"one of {', '.join(_KINDS)} in the column kind", kind)
    return cast("SourceKind", kind)


def _span(path: str, row: int, values: _Row) -> tuple[float, float] | None:
    given = {name: values.get(name) for name in ("start", "end")}
    if given["start"] in (None, "") and given["end"] in (None, ""):
        return None
    try:
        start, end = (float(cast("str", given[name])) for name in ("start", "end"))
    except (TypeError, ValueError) as error:
        raise mistake(path, row, "seconds in the columns start and end", given) from error
    if not (math.isfinite(end) and 0 <= start < end):
        raise mistake(path, row, "0 <= start < end", given)
    return start, end


def _captions(
    path: str, row: int, values: _Row, span: tuple[float, float] | None
) -> tuple[Caption, ...]:
    if values.get("captions"):
        try:
            return _CAPTIONS.validate_json(str(values["captions"]))
        except ValidationError as error:
            raise mistake(
                path, row, 'captions as [{"t0": s, "t1": s, "text": …}]', values["captions"]
            ) from error
    whole = about_everything(str(values.get("caption") or ""), base_name(path))
    if span is None:
        return whole
    return tuple(one.model_copy(update={"t0": span[0], "t1": span[1]}) for one in whole)


def _labels(values: _Row) -> Labels:
    labels: Labels = {}
    for name, value in values.items():
        if name in _COLUMNS or value is None or value == "":
            continue
        if isinstance(value, bool):
            labels[name] = int(value)
        else:
            labels[name] = value if isinstance(value, int | float) else _number(str(value))
    return plain_labels(labels)


def _number(text: str) -> str | int:
    """A whole number where that loses nothing: `007` stays a text."""
    return int(text) if text.isdecimal() and str(int(text[:18])) == text else text


def require_table(path: str) -> None:
    """Makes sure that a manifest can be read.

    Raises:
        UsageError: It is of another format.
    """
    if suffix_of(path) not in (".csv", ".parquet"):
        raise UsageError(
            f"{path}: expected a table called .csv or .parquet", remedy="Rename or convert it."
        )
