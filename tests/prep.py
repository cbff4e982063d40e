"""What tests of the preparation share: preparing a folder, what it wrote, who works at what."""

from pathlib import Path

from data_prep.kinds.opening import open_sources
from data_prep.prepare import Inputs, PrepReport, prepare
from data_prep.records import item_id
from data_prep.settings import PrepSettings


def run_prep(*sources: Path, out: Path, settings: PrepSettings, **changes) -> PrepReport:
    """Prepares files and folders."""
    return prepare(Inputs(arguments=tuple(map(str, sources))), out, settings, **changes)


def visible_files(dataset: Path) -> dict[str, bytes]:
    """Everything that a dataset shows to the world."""
    return {path.name: path.read_bytes() for path in dataset.iterdir() if path.is_file()}


def markers(dataset: Path, sources: Path, settings: PrepSettings) -> dict[str, Path]:
    """The file that is there while a worker is at a source, by the source's name."""
    text = settings.digest_text()
    found = {source.name: item_id(source, text) for source in open_sources([str(sources)])}
    return {name: dataset / ".prep" / "running" / item for name, item in found.items()}
