"""Commits below a URL: object stores have no rename, so there the manifest is the success marker.

URL/RUN/config.yaml, run.json          what a resume needs besides a checkpoint
URL/RUN/step-00000400/…                files of a commit, uploaded in any order
URL/RUN/step-00000400/manifest.json    uploaded last: without it, nothing there is a commit
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import Manifest
from pipeline.errors import CheckpointError, StorageError

_ASIDE = "manifest.aside.json"


class CommitStore:
    """The commits of one run in an object store, or in any file system that fsspec knows.

    Credentials and end points come from the environment, as each service's own tools take them.

    Args:
        url: Such as s3://bucket/prefix.
        run_name: The run's name, below the URL.

    Raises:
        StorageError: The URL's kind is unknown, or its library is not installed.
    """

    def __init__(self, url: str, run_name: str) -> None:
        self.url = f"{url.rstrip('/')}/{run_name}"
        fs: Any  # fsspec is not typed
        with self._naming("open"):
            # Listings from memory would hide what other ranks have written since.
            fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False, **_options(url))
        self._fs, self._root = fs, str(root).rstrip("/")

    def steps(self) -> list[int]:
        """Steps of all commits, rising; whether their bytes are right is another question."""
        with self._naming("list"):
            self._fs.invalidate_cache()
            markers = self._fs.glob(f"{self._root}/step-*/{layout.MANIFEST}")
        found = (layout.step_of(PurePosixPath(marker).parent.name) for marker in markers)
        return sorted(step for step in found if step is not None)

    def put(self, step: int, path: str, local: Path) -> None:
        """Uploads one file of a commit and compares its size.

        Raises:
            StorageError: It did not arrive.
        """
        target = self._path(step, path)
        with self._naming(f"write {path} of step {step} to"):
            self._fs.put_file(str(local), target)
            arrived, size = self._fs.size(target), local.stat().st_size
        if arrived != size:
            raise StorageError(f"{target}: {arrived} of {size} bytes arrived.")

    def mark(self, step: int, manifest: bytes) -> None:
        """Makes what was put there a commit."""
        with self._naming(f"mark step {step} in"):
            self._fs.pipe_file(self._path(step, layout.MANIFEST), manifest)

    def set_aside_from(self, step: int) -> list[int]:
        """Takes the marker from commits of this step and later ones, which a resume left behind.

        Their files stay until that step is saved again.

        Returns:
            Their steps.
        """
        later = [there for there in self.steps() if there >= step]
        for there in later:
            with self._naming(f"set step {there} aside in"):
                marker = self._path(there, layout.MANIFEST)
                self._fs.pipe_file(self._path(there, _ASIDE), self._fs.cat_file(marker))
                self._fs.rm_file(marker)
        return later

    def clear(self, step: int) -> None:
        """Removes all files of a step, its marker first."""
        with self._naming(f"remove step {step} from"):
            marker, folder = self._path(step, layout.MANIFEST), self._path(step, "")
            if self._fs.exists(marker):
                self._fs.rm_file(marker)
            if self._fs.exists(folder):
                self._fs.rm(folder, recursive=True)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a commit.

        Raises:
            CheckpointError: It is damaged or of another schema.
        """
        path = self._path(step, layout.MANIFEST)
        with self._naming(f"read the manifest of step {step} from"):
            content = self._fs.cat_file(path)
        return layout.parse_manifest(content, f"{self.url}: {path}")

    def fetch(self, step: int, folder: Path) -> None:
        """Downloads a commit into a folder, manifest included; nothing is verified yet.

        Raises:
            CheckpointError: Its manifest is damaged or names files outside of it.
        """
        for entry in self.manifest(step).files:
            parts = PurePosixPath(entry.path).parts
            if not parts or parts[0] == "/" or ".." in parts:
                raise CheckpointError(f"{self.url}: step {step} names a file {entry.path!r}.")
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._naming(f"fetch {entry.path} of step {step} from"):
                self._fs.get_file(self._path(step, entry.path), str(target))
        with self._naming(f"fetch the manifest of step {step} from"):
            content = self._fs.cat_file(self._path(step, layout.MANIFEST))
        (folder / layout.MANIFEST).write_bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file beside the commits."""
        with self._naming(f"write {name} to"):
            self._fs.pipe_file(f"{self._root}/{name}", content)

    def read(self, name: str) -> bytes | None:
        """A small file beside the commits; None if there is none of this name."""
        with self._naming(f"read {name} from"):
            path = f"{self._root}/{name}"
            return self._fs.cat_file(path) if self._fs.exists(path) else None

    def run_id(self) -> str | None:
        """Of the run whose commits these are; None if there is none yet."""
        content = self.read("run.json")
        return None if content is None else json.loads(content).get("run_id")

    def _path(self, step: int, path: str) -> str:
        return f"{self._root}/{layout.commit_name(step)}/{path}".rstrip("/")

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Names what was wanted of the store; its libraries raise many kinds of error."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            words = str(error) or type(error).__name__
            raise StorageError(
                f"Cannot {what} {self.url}: {words}",
                remedy="Check the URL, its credentials and the network, then resume.",
            ) from error


def _options(url: str) -> dict[str, Any]:
    # Object stores know no folders; a file system wants them made.
    return {"auto_mkdir": True} if url.startswith("file:") else {}
