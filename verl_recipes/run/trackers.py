"""Checks of the trackers before a run starts: the package, the key, and whether the server answers."""

import os
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from data_prep.cli import UserError

ANSWER_SECONDS = 10  # for a tracker's server, before anything starts
ADDRESS = {  # code that prints the address of the tracker's server
    "wandb": "import wandb; print(wandb.setup().settings.base_url)",
    "swanlab": "import swanlab; print(swanlab.Settings().api_host)",
}


def has_login(hosts: Sequence[str], *files: str) -> bool:
    """Whether one of these files below the home directory holds a login for a host, as `wandb login` writes it."""
    for file in files:
        with suppress(OSError, NetrcParseError):
            if any(host in machine for machine in netrc(Path.home() / file).hosts for host in hosts):
                return True
    return False


def tracker_server(name: str, environment: Mapping[str, str]) -> str | None:
    """The address that a tracker sends to, read by its own package; None if the tracker only writes files."""
    if name == "mlflow" and environment["MLFLOW_TRACKING_URI"].startswith("http"):
        return environment["MLFLOW_TRACKING_URI"]
    if name not in ADDRESS or environment[f"{name.upper()}_MODE"] not in ("online", "shared", "cloud"):
        return None
    # In another process: wandb starts a service, and the cleanup of the run would kill it.
    asked = subprocess.run([sys.executable, "-P", "-c", ADDRESS[name]], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"tracker={name}: its settings could not be read: {asked.stderr.strip().splitlines()[-1]}")
    return asked.stdout.split()[-1]


def server_answers(address: str) -> bool:
    """Whether a server answers at all: any status and any certificate count."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except (HTTPError, HTTPException):
        pass
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def check_trackers(trackers: Mapping[str, Any]) -> None:
    """Raise UserError if a tracker's package or key is missing, or its server does not answer."""
    for name, tracker in trackers.items():
        if name not in ("console", "file") and find_spec(name) is None:
            raise UserError(f"tracker={name}: the package is not installed; `pip install -e '.[trackers]'`")
        uri = urlsplit(tracker.environment.get("MLFLOW_TRACKING_URI", ""))
        if uri.password or (uri.scheme.startswith("http") and uri.username):  # of a server's address, a token
            raise UserError(
                "MLFLOW_TRACKING_URI holds a password or a token, which config.yaml and log.txt would hold too; take "
                "it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        server = tracker_server(name, tracker.environment)
        if server is None:
            continue
        instead = f"{name.upper()}_MODE=offline and later `{name} sync` (configs/tracker/{name}.yaml)"
        login = {
            # wandb takes a login for its former address too.
            "wandb": has_login((urlsplit(server).hostname or "", "api.wandb.ai"), ".netrc", "_netrc"),
            "swanlab": has_login(("",), ".swanlab/.netrc"),
            "mlflow": True,
        }
        if not login[name] and not os.environ.get(f"{name.upper()}_API_KEY"):
            raise UserError(f"tracker={name}: no key; set {name.upper()}_API_KEY, or {instead}")
        if not server_answers(server):
            instead = "unset MLFLOW_TRACKING_URI for a file" if name == "mlflow" else f"wait for it, or set {instead}"
            raise UserError(f"tracker={name}: {server} does not answer; {instead}")
