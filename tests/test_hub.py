"""A hub that answers, is silent, refuses or is out of reach, with and without a proxy, for models and data sets."""

import socket
from contextlib import contextmanager, nullcontext

import huggingface_hub
import pytest
from hub_server import COMMIT, hub
from huggingface_hub import constants

from data_prep import hub as asking
from data_prep.cli import UserError
from data_prep.sources import hub as data_of
from verl_recipes.run.model import check_model

REPO = "some/thing"
NOWHERE = "http://127.0.0.1:9"
FILES = {"config.json": b"{}", "README.md": b"# A thing\n"}
PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
DATA = {"name": "hub", "repo": REPO, "revision": "main", "split": "train", "subset": None}
DATA |= {"columns": {"numbers": "nums", "target": "target"}}


@pytest.fixture
def reached(monkeypatch, tmp_path):
    """A function that sets the hub's address and the proxies; the client reads both once a process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", *PROXIES, *map(str.lower, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path), raising=False)

    def at(address, **proxies):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for name, value in proxies.items():
            monkeypatch.setenv(name, value)
        huggingface_hub.close_session()

    yield at
    huggingface_hub.close_session()


@contextmanager
def silent():
    """An address that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def line(act):
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


ASKED = {"model": lambda: check_model(REPO), "data": lambda: data_of(DATA)}


@pytest.mark.slow
def test_a_hubs_model_is_identified_by_its_commit(reached):
    with hub(REPO, FILES) as (address, _):
        reached(address)
        assert check_model(REPO) == {"revision": COMMIT}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("server", [silent, lambda: nullcontext(NOWHERE)], ids=["says-nothing", "out-of-reach"])
def test_a_hub_that_does_not_answer_is_one_line_that_names_the_mirror_setting(reached, monkeypatch, server, kind):
    monkeypatch.setattr(asking, "TIMEOUT", 0.3)  # all of it passes
    with server() as address:
        reached(address)
        told = line(ASKED[kind])
    assert "does not answer" in told
    assert "HF_ENDPOINT" in told


@pytest.mark.parametrize("kind", ASKED)
def test_a_hub_that_ends_the_connection_in_the_midst_is_one_line_that_names_the_mirror_setting(reached, kind):
    with hub(REPO, FILES, drops=True) as (address, _):
        reached(address)
        assert "HF_ENDPOINT" in line(ASKED[kind])


@pytest.mark.parametrize("kind", ASKED)
def test_a_name_that_the_hub_does_not_know_is_one_line_with_the_name(reached, kind):
    with hub("another/thing", FILES) as (address, _):
        reached(address)
        told = line(ASKED[kind])
    assert REPO in told
    assert "does not answer" not in told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize(
    "proxies",
    [{"ALL_PROXY": "socks5://127.0.0.1:9"}, {"http_proxy": "socks5h://127.0.0.1:9"}, {"HTTP_PROXY": "127.0.0.1:port"}],
    ids=["socks", "socks-small-letters", "no-address"],
)
def test_a_proxy_that_the_client_cannot_use_is_one_line_with_the_way_out(reached, kind, proxies):
    with hub(REPO, FILES) as (address, asked):
        reached(address, **proxies)
        told = line(ASKED[kind])
    assert told.count("unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY") == 1
    assert not asked


@pytest.mark.parametrize("kind", ASKED)
def test_a_proxy_out_of_reach_is_one_line(reached, kind):
    with hub(REPO, FILES) as (address, asked):
        reached(address, HTTP_PROXY=NOWHERE)
        assert "does not answer" in line(ASKED[kind])
    assert not asked


@pytest.mark.slow
def test_a_proxy_that_works_is_used(reached):
    with hub(REPO, FILES) as (address, asked):
        reached("http://hub.invalid", HTTP_PROXY=address)
        assert check_model(REPO) == {"revision": COMMIT}
    assert asked


def test_a_model_that_a_command_makes_is_not_asked_of_a_hub(reached, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reached(NOWHERE)
    assert "`bash launch/middle.sh` makes models/middle" in line(lambda: check_model("models/middle"))
