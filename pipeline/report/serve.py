"""A run's report as a page that follows the run, for browsers on this machine.

Nothing of the run's folder is handed out but the rendered page, so no path in a request can reach a
file. Pages are drawn in one thread of low priority, only when the run has written something and
somebody looks.
"""

import ipaddress
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import JepaError, StorageError, UsageError
from pipeline.report.facts import gather
from pipeline.report.live import HEAD, POLICY, SCRIPT
from pipeline.report.page import render
from pipeline.track.folder import PROBE_FOLDER

_NICE = 10
# Who has not asked for so long has gone.
_WATCHED_SECONDS = 60.0
# Whether a run is silent depends on the clock alone.
_OLDEST_SECONDS = 60.0
_FIRST_SECONDS = 120.0
_LEFT_OUT = "the live page does not draw them"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Page:
    """A page as it was drawn."""

    version: int
    html: bytes
    state: str
    step: int


class LivePage:
    """The newest page of a run, drawn again behind the requests.

    Args:
        run_dir: Folder of the run.
        every_seconds: At most so often.
    """

    def __init__(self, run_dir: Path, every_seconds: float) -> None:
        self._run_dir, self._every = run_dir, every_seconds
        self._page: _Page | None = None
        self._problem = ""
        self._asked = time.monotonic()
        self._first, self._end = threading.Event(), threading.Event()

    def start(self) -> None:
        """Draws from now on."""
        threading.Thread(target=self._draw, name="pages", daemon=True).start()

    def stop(self) -> None:
        """Ends drawing."""
        self._end.set()

    def page(self) -> _Page | None:
        """The newest page; waits for the first one. None if it cannot be drawn."""
        self._asked = time.monotonic()
        self._first.wait(_FIRST_SECONDS)
        return self._page

    def state(self) -> dict[str, Any]:
        """What a browser asks for again and again."""
        page = self.page()
        told = {"problem": self._problem or None}
        if page is None:
            return {"version": 0, "state": "unknown", "step": 0, **told}
        return {"version": page.version, "state": page.state, "step": page.step, **told}

    def _draw(self) -> None:
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        seen: object = None
        drawn = 0.0
        while not self._end.is_set():
            now = time.monotonic()
            is_watched = now - self._asked < _WATCHED_SECONDS or not self._first.is_set()
            try:
                stamps = _stamps(self._run_dir) if is_watched else seen
            except StorageError as error:
                self._problem = str(error)  # a file system may come back; the page says so
                stamps = seen
            if stamps != seen or (is_watched and now - drawn > _OLDEST_SECONDS):
                self._draw_once()
                seen, drawn = stamps, time.monotonic()
                self._first.set()
            self._end.wait(self._every)

    def _draw_once(self) -> None:
        try:
            facts = gather(self._run_dir)
            html = render(facts, left_out=_LEFT_OUT).replace("</head>", f"{HEAD}</head>", 1)
        except (JepaError, OSError) as error:
            self._problem = str(error)  # the last page stays, and says so
            return
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Without this thread an old page would look live.
            self._problem = f"the page cannot be drawn: {type(error).__name__}: {error}"
            return
        version = self._page.version + 1 if self._page is not None else 1
        self._page = _Page(
            version=version,
            html=html.encode("utf-8", "backslashreplace"),
            state=facts.state,
            step=facts.last_step,
        )
        self._problem = ""


def serve_report(
    run_dir: Path, *, host: str, port: int, every_seconds: float, tell: Callable[[str], None]
) -> None:
    """Serves a run's live report until Ctrl-C or SIGTERM.

    Args:
        run_dir: Folder of the run.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        every_seconds: The page is drawn again at most so often.
        tell: Called with the page's address once it can be opened.

    Raises:
        UsageError: The address cannot be listened on.
        StorageError: It is no run's folder any more.
    """
    live = LivePage(run_dir, every_seconds)
    handler = type("Handler", (_Handler,), {"live": live, "hosts": _names(host)})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_class = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        server = server_class((host, port), handler)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="Take another one with --port, or any free one with --port 0.",
        ) from error
    live.start()
    shown = f"[{host}]" if ":" in host else host
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tell(f"http://{shown}:{server.server_address[1]}/")
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        return  # the way to end it
    finally:
        signal.signal(signal.SIGTERM, before)
        live.stop()
        server.server_close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    """Three answers and no files."""

    live: ClassVar[LivePage]
    hosts: ClassVar[frozenset[str] | None]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jepa", ""
    timeout = 30

    def do_GET(self) -> None:
        """Answers the page, its script, and whether there is a newer one."""
        if self.hosts is not None and _without_port(self.headers.get("Host", "")) not in self.hosts:
            # A page from elsewhere whose name was made to point here must not read the run.
            self._answer(HTTPStatus.FORBIDDEN, b"not for this name\n", "text/plain")
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer_page()
        elif path == "/live.js":
            self._answer(HTTPStatus.OK, SCRIPT.encode(), "text/javascript")
        elif path == "/state":
            told = json.dumps(self.live.state()).encode()
            self._answer(HTTPStatus.OK, told, "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is only /\n", "text/plain")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a browser asks every other second."""

    def _answer_page(self) -> None:
        page = self.live.page()
        if page is None:
            problem = str(self.live.state()["problem"]).encode()
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, problem, "text/plain")
            return
        self._answer(HTTPStatus.OK, page.html, "text/html", version=page.version)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, *, version: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Version", str(version))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _names(host: str) -> frozenset[str] | None:
    """Names by which the server may be asked; None where others than this machine may ask."""
    return frozenset({host, "localhost", "127.0.0.1", "[::1]"}) if is_loopback(host) else None


def _without_port(name: str) -> str:
    head, _, tail = name.rpartition(":")
    return head if head and tail.isdigit() and not head.endswith(":") else name


def _stamps(run_dir: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when anything changes that the page is drawn from."""
    found = []
    for folder in (run_dir, run_dir / "checkpoints", run_dir / PROBE_FOLDER):
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            for entry in entries:
                if not entry.name.startswith(".") and entry.name != "report.html":
                    stat = entry.stat()
                    found.append((entry.path, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"Cannot read {folder}: {error}") from error
    return tuple(found)
