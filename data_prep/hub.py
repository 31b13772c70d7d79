"""The Hugging Face Hub: whether it answers within seconds, and its errors in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import getproxies_environment

TIMEOUT = 10  # seconds for the hub's first answer; its client would wait for ever, or retry for minutes
WITHOUT_PROXY = "unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY"
MIRROR = "check the name, `hf auth login` if it asks for that, set HF_ENDPOINT to a mirror, or unset HF_HUB_OFFLINE"


def in_one_clause(error: BaseException) -> str:
    """The first line of an error, with advice if the client cannot use a proxy."""
    lines = str(error).strip().splitlines()
    clause = lines[0].rstrip(".") if lines else type(error).__name__
    unreadable = type(error).__name__ == "InvalidURL" and getproxies_environment()  # httpx's
    if WITHOUT_PROXY not in clause and ("socks" in clause.lower() or "proxy url" in clause.lower() or unreadable):
        clause += f"; {WITHOUT_PROXY}, or for SOCKS pip install 'httpx[socks]'"
    return clause


def hub_fault(repo: str, kind: str, revision: str | None = None) -> Exception | None:
    """The error if the hub does not answer, because it is offline or out of reach; then only its cache can be used.

    Args:
        repo: owner/name.
        kind: "model" or "dataset".
        revision: branch, tag or commit.

    Raises:
        OSError: the hub answers, but refuses.
        ValueError: the name or the proxy is invalid.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        return error
    except (ImportError, httpx.InvalidURL) as error:  # no support for a SOCKS proxy; a proxy's address that is none
        raise ValueError(in_one_clause(error)) from None
    return None


@contextmanager
def reports_cache(fault: Exception | None, what: str) -> Iterator[None]:
    """If the hub does not answer, the block reads its cache: print that, or raise if the cache is not enough.

    Raises:
        OSError: the cache lacks something that the block needs.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (OSError, ValueError):
        if fault is None:
            raise
        raise OSError(f"the hub does not answer ({in_one_clause(fault)}), and its cache does not have it") from None
    if fault is not None and not isinstance(fault, OfflineModeIsEnabled):
        print(f"{what}: the hub does not answer ({in_one_clause(fault)}); taken from its cache", file=sys.stderr)
