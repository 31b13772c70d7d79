"""A page that follows its run: made anew when the run has done something, and on request served on loopback."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from data_prep.cli import UserError
from verl_recipes.run.folder import RunFolder
from verl_recipes.run.supervise import size_of

EVERY = 15  # seconds between two looks at least, and after which a browser loads the page again
IDLE = 10  # times as long as making the page takes, nothing is done: the run needs the machine
HOST = "127.0.0.1"  # no other machine reaches it


def trace(folders: Sequence[Path]) -> tuple[int, ...]:
    """Changes whenever one of the runs has done something."""
    runs = map(RunFolder, folders)
    return tuple(size_of(file) for run in runs for file in (run.metrics, run.metrics_part, run.events, run.summary))


def watch(folders: Sequence[Path], make: Callable[[int], Path]) -> None:
    """Make the page now, again whenever a run has done something, and a last time when all runs have ended.

    Args:
        make: writes the page, given the seconds after which a browser loads it again.
    """
    seen, took = None, 0.0
    while any(RunFolder(each).is_locked() for each in folders):  # a command is using it
        if (now := trace(folders)) != seen:
            seen, began = now, time.monotonic()
            try:
                make(EVERY)
            except FileNotFoundError:  # fresh=true is emptying the run, whose files go while they are read
                seen = None
            took = time.monotonic() - began
        time.sleep(max(EVERY, IDLE * took))
    make(0)


class Page(BaseHTTPRequestHandler):
    """Serves one file, at `/` alone."""

    def __init__(self, file: Path, *arguments: object) -> None:
        self.file = file
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """The page as it is now."""
        if self.path != "/":
            return self.send_error(404)
        try:
            content, status = self.file.read_bytes(), 200
        except FileNotFoundError:  # the run was emptied; the browser asks again
            content, status = f'<meta http-equiv="refresh" content="{EVERY}">The page is made again.'.encode(), 503
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal belongs to the address."""


class Server(ThreadingHTTPServer):
    """A thread a request."""

    def handle_error(self, *arguments: Any) -> None:
        """A browser may close its connection at any moment; that is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)


def serve(file: Path, port: int) -> ThreadingHTTPServer:
    """Serve the file at http://127.0.0.1:PORT/ in a thread, until the process ends.

    Args:
        port: 0 for any that is free.

    Raises:
        UserError: the port is taken.
    """
    try:
        server = Server((HOST, port), partial(Page, file))
    except OSError as error:
        raise UserError(f"port={port}: {error.strerror}; port=0 takes a free one") from None
    Thread(target=server.serve_forever, daemon=True).start()
    return server
