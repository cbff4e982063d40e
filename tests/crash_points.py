"""Records what a piece of code does to a folder, and rebuilds what a crash may have left of it.

Every change of a name and every synchronisation is recorded as it happens, and whatever has been
written to files since the last one. From any prefix of that record `leftovers` builds the folder as

- a killed process leaves it: everything that was done is there;
- a power cut may leave it: names that no folder synchronisation covers are there or not, one of
  them may have come before the others, and what was written but not synchronised is whole, torn,
  empty or zeros.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    kind: str  # write, sync, sync_folder, rename, make, remove
    path: str
    target: str = ""
    content: bytes = b""


class Recorder:
    """The operations of the code that runs inside `recording`, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self._seen = contents(root)

    @contextmanager
    def recording(self) -> Iterator[None]:
        originals = {name: getattr(os, name) for name in _WRAPPED}
        for name, wrap in _WRAPPED.items():
            setattr(os, name, wrap(self, originals[name]))
        try:
            yield
            self.note_writes()
        finally:
            for name, function in originals.items():
                setattr(os, name, function)

    def note_writes(self) -> None:
        now = contents(self.root)
        for path, content in now.items():
            if path not in self._seen or self._seen[path] != content:
                kind = "make" if content is None else "write"
                self.operations.append(Operation(kind, path, content=content or b""))
        self._seen = now

    def note(self, operation: Operation) -> None:
        self.operations.append(operation)
        self._seen = contents(self.root)

    def name(self, path: object) -> str | None:
        path = Path(str(path)).absolute()
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file's content and every folder (None) below a folder."""
    found: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        found[path.relative_to(root).as_posix()] = path.read_bytes() if path.is_file() else None
    return found


def leftovers(
    before: dict[str, bytes | None], operations: list[Operation], count: int
) -> Iterator[dict[str, bytes | None]]:
    """What may be there when only the first `count` operations were begun."""
    done = operations[:count]
    yield _apply(before, done)
    durable = _durable_names(done)
    for torn in (_whole, _half, _nothing, _zeros):
        yield _apply(before, done, torn)
        yield _apply(before, [op for i, op in enumerate(done) if i in durable], torn)
    # A file system may write names in another order than that in which they were given.
    for early in (i for i, op in enumerate(done) if op.kind == "rename" and i not in durable):
        yield _apply(before, [op for i, op in enumerate(done) if i in durable or i == early], _half)


def build(tree: dict[str, bytes | None], folder: Path) -> None:
    """Makes a folder of these contents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _whole(content: bytes) -> bytes:
    return content


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _nothing(content: bytes) -> bytes:
    return b""


def _zeros(content: bytes) -> bytes:
    return bytes(len(content))


def _durable_names(operations: list[Operation]) -> set[int]:
    """Operations that survive a power cut whatever the file system does."""
    return {number for number in range(len(operations)) if _is_durable(number, operations)}


def _is_durable(number: int, operations: list[Operation]) -> bool:
    """Whether the folder of what this operation named was synchronised later."""
    operation = operations[number]
    if operation.kind in ("sync", "sync_folder"):
        return True
    name = operation.target or operation.path
    for later in operations[number + 1 :]:
        if later.kind == "sync_folder" and later.path == str(Path(name).parent):
            return True
        if later.kind == "rename" and (name == later.path or name.startswith(f"{later.path}/")):
            name = later.target + name[len(later.path) :]
    return False


def _apply(
    before: dict[str, bytes | None],
    operations: list[Operation],
    torn: Callable[[bytes], bytes] | None = None,
) -> dict[str, bytes | None]:
    """The contents after these operations; `torn` is done to what was never synchronised."""
    tree, unsynced = dict(before), set()
    for op in operations:
        if op.kind == "rename":
            tree, unsynced = _renamed(tree, unsynced, op)
        else:
            _apply_in_place(tree, unsynced, op)
    if torn is not None:
        for name in unsynced & tree.keys():
            tree[name] = torn(tree[name] or b"")
    return tree


def _apply_in_place(tree: dict[str, bytes | None], unsynced: set[str], op: Operation) -> None:
    if op.kind == "write":
        tree[op.path] = op.content
        unsynced.add(op.path)
    elif op.kind == "make":
        tree[op.path] = None
    elif op.kind == "sync":
        unsynced.discard(op.path)
    elif op.kind == "remove":
        for name in [n for n in tree if n == op.path or n.startswith(f"{op.path}/")]:
            del tree[name]


def _renamed(
    tree: dict[str, bytes | None], unsynced: set[str], op: Operation
) -> tuple[dict[str, bytes | None], set[str]]:
    def new(name: str) -> str:
        if name == op.path or name.startswith(f"{op.path}/"):
            return op.target + name[len(op.path) :]
        return name

    moved = {name for name in tree if new(name) != name}
    targets = {new(name) for name in moved}
    kept = {n: c for n, c in tree.items() if n not in moved and n not in targets}
    kept.update({new(name): tree[name] for name in moved})
    return kept, {new(name) for name in unsynced if name in moved or name not in targets}


def _wrap_sync(recorder: Recorder, original: Callable) -> Callable:
    def fsync(descriptor: int) -> None:
        name = recorder.name(Path(f"/proc/self/fd/{descriptor}").readlink())
        recorder.note_writes()
        original(descriptor)
        if name is not None:
            is_folder = (recorder.root / name).is_dir()
            recorder.note(Operation("sync_folder" if is_folder else "sync", name))

    return fsync


def _wrap_rename(recorder: Recorder, original: Callable) -> Callable:
    def rename(source: object, target: object, **named: object) -> None:
        name, new = recorder.name(source), recorder.name(target)
        recorder.note_writes()
        original(source, target, **named)
        if name is not None and new is not None:
            recorder.note(Operation("rename", name, target=new))

    return rename


def _wrap_remove(recorder: Recorder, original: Callable) -> Callable:
    def remove(path: object, *rest: object, **named: object) -> None:
        recorder.note_writes()
        before = contents(recorder.root)
        original(path, *rest, **named)
        # rmtree removes by descriptors; what is gone afterwards is what was removed.
        for name in sorted(before.keys() - contents(recorder.root).keys()):
            recorder.note(Operation("remove", name))

    return remove


_WRAPPED = {
    "fsync": _wrap_sync,
    "rename": _wrap_rename,
    "replace": _wrap_rename,
    "unlink": _wrap_remove,
    "rmdir": _wrap_remove,
}
