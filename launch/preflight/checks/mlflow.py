"""Whether MLflow answers; a run goes on without it, so this only warns."""

import sqlite3
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from launch.preflight.finding import Finding, Situation
from pipeline.redact import redacted
from pipeline.track.mlflow_sink import tracking_uri

NAME = "mlflow"
_SECONDS = 5.0


def check_mlflow(situation: Situation) -> Finding:
    """Asks the server whether it is well, or opens the database."""
    config = situation.config.track.mlflow
    if not config.enabled:
        return Finding(name=NAME, state="skip", got="track.mlflow.enabled is false")
    uri = tracking_uri(config, situation.config.run_dir)
    shown = redacted(uri)
    finding = Finding(name=NAME, state="ok", expected=f"{shown} answers", got="it does")
    if find_spec("mlflow") is None:
        return finding.worse(
            "warn", "mlflow is not installed", "pip install 'jepa-pipeline[train]'"
        )
    trouble = _server(uri) if urlsplit(uri).scheme in ("http", "https") else _database(uri)
    if trouble is None:
        return finding
    return finding.worse(
        "warn",
        redacted(trouble),
        "The run goes on and sends its points later; correct track.mlflow.tracking_uri or start "
        "the server to see them live.",
    )


def _server(uri: str) -> str | None:
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=_SECONDS) as answer:  # noqa: S310 - http(s)
            return None if answer.status == 200 else f"status {answer.status}"
    except HTTPError as error:
        # It is there; a proxy may guard even its word of health.
        return f"it refuses: status {error.code}" if error.code not in (401, 403) else None
    except (URLError, OSError, ValueError) as error:
        return f"no answer: {error}"


def _database(uri: str) -> str | None:
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return None  # another database is its driver's to ask
    path = Path(uri.removeprefix(prefix))
    if not path.exists():
        return None if _has_writable_parent(path) else f"{path.parent} cannot be written to"
    try:
        with sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=_SECONDS) as database:
            database.execute("pragma schema_version")
    except sqlite3.Error as error:
        return f"{path}: {error}"
    return None


def _has_writable_parent(path: Path) -> bool:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir()
