"""What every command answers to a person who asks or errs: help, version, misspelt words, own configurations, Tab."""

import copy
import os
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
import yaml
from configurations import options
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_data import VALUES

from data_prep import cli, traces
from data_prep import command as data_command
from data_prep.cli import CONFIGS, UserError
from data_prep.help import did_you_mean
from data_prep.schema import RenderKeys
from verl_recipes import __main__ as entry
from verl_recipes import (
    bench,
    doctor,
    evaluate,
    export,
    fetch,
    middle_base,
    plan,
    play,
    runs,
    tiny_base,
    train,
    warm_start,
)
from verl_recipes.report import ReportKeys
from verl_recipes.run.evaluation import SamplingKeys

ROOT = CONFIGS.parent
MODULES = {path for path in entry.COMMANDS.values() if path.stem not in ("__main__",)}


def typed(monkeypatch, main, *arguments):
    """Call a command as it is typed, in the checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return main()


def test_every_commands_help_shows_at_least_two_ways_to_type_it():
    for path in MODULES:
        document = path.read_text(encoding="utf-8").split('"""')[1]
        assert document.count("    python -m ") >= 2, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "arguments", "advice"),
    [
        (train.main, ["hardwre=cpu"], "there is no key 'hardwre'; did you mean hardware=?"),
        (train.main, ["data.train_fils=x"], "did you mean data.train_files=?"),
        (train.main, ["dta.train_files=x"], "did you mean data.train_files=?"),
        (train.main, ["recipe.prompts=8"], "did you mean prompts=?"),
        (train.main, ["reward.my_key=1"], "+reward.my_key= adds it"),
        (export.main, ["model=x"], "model= is no key or group of this command"),
        (evaluate.main, ["model=assets/tiny_base", "data=[]"], "data=[]: should have at least 1 item"),
        (evaluate.main, ["model=runs/nope"], "there is no runs/nope"),
        (train.main, ["total_training_steps=3"], "did you mean trainer.total_training_steps="),
        (train.main, ["hardware=h100x4"], "did you mean hardware=h100_x4?"),
        (train.main, ["recipe=grpo"], "did you mean recipe=dr_grpo or recipe=grpo_passk or recipe=tinyzero_grpo?"),
        (train.main, ["model=own/a-model"], "a hub's name: model=local actor_rollout_ref.model.path=own/a-model"),
        (train.main, ["seeds=0,1"], "'seeds=0,1' is ambiguous; a list is written seeds=[0,1]"),
        (train.main, ["seeds=[0,", "1]"], "write a list without spaces, such as seeds=[0,1]"),
        (train.main, ["no_such=1"], "there is no key 'no_such'; --help shows the keys, and +no_such= adds it"),
        (train.main, ["--sed=3"], "there is no option --sed; .*; did you mean seed=?"),
        (train.main, ["--hlep"], "did you mean --help?"),
        (train.main, ["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (
            evaluate.main,
            ["model=assets/tiny_base", "run_dir=runs/x"],
            "run_dir= is set by this command; its own keys",
        ),
        (evaluate.main, ["model=assets/tiny_base", "seeds=[0,1]"], "seeds= is set by this command"),
        (evaluate.main, ["model=assets/tiny_base", "++data.val_files=x"], "data.val_files= is set by this command"),
        (bench.main, ["model=assets/tiny_base", "warm_start=x"], "warm_start= is set by this command"),
        (warm_start.main, ["seeds=[0,1]"], "seeds= is set by this command; a warm start has one seed, seed=N"),
        (
            tiny_base.main,
            ["out=x", "prompt=mini_r1"],
            "prompt=mini_r1: a prompt of one message with the problem",
        ),
        (
            tiny_base.main,
            ["out=x", "preset=3to4"],
            "preset=3to4: problems of three numbers with a max",
        ),
        (tiny_base.main, ["out=x", "preset.count=3"], "preset.count=3: should be a list"),
        (data_command.main, ["foo=1"], "there is no key 'foo'; --help shows the keys"),
        (
            play.main,
            ["model=assets/tiny_base", "numbers=[3,-4]", "target=7"],
            "numbers.1=-4: should be greater",
        ),
        (plan.main, ["plan.swep=true"], "did you mean plan.sweep=?"),
        (evaluate.main, ["modl=assets/tiny_base"], "there is no key 'modl'; did you mean model=?"),
        (evaluate.main, ["model=assets/tiny_base", "temprature=0"], "did you mean temperature=?"),
        (evaluate.main, ["model=assets/tiny_base", "recpie=tiny"], "did you mean recipe=?"),
        (warm_start.main, ["step=3"], "did you mean steps=?"),
        (train.main, ["lr=1e-4"], "did you mean learning_rate=?"),
        (train.main, ["batch_size=8"], "data.train_batch_size="),
        (train.main, ["steps=8"], "trainer.total_training_steps="),
        (play.main, ["model=qwen2.5_3b"], "qwen2.5_3b is a name of configs/model"),
        (export.main, ["rn=x"], "did you mean run=?"),
        (play.main, ["model=assets/tiny_base", "prompt=mini_r"], "did you mean prompt=mini_r1?"),
        (fetch.main, ["model=qwen2.5_3"], "did you mean model=qwen2.5_3b?"),
        (data_command.main, ["preset.numbres=[1,9]"], "did you mean preset.numbers=?"),
        (traces.main, ["langauge=zh"], "did you mean language=?"),
        (entry.main, ["trian"], "'trian' is not a command; did you mean train?"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(monkeypatch, main, arguments, advice):
    with pytest.raises(UserError) as error:
        typed(monkeypatch, main, *arguments)
    text, *parts = str(error.value), *advice.split(".*")
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == 1


def test_what_goes_on_is_said_without_fresh(monkeypatch):
    for arguments, said in (([], ""), (["fresh=true"], " without fresh=true")):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        assert cli.same_command() == f"the same command{said}"


def test_a_file_of_your_own_with_a_shipped_name_is_refused_and_not_silently_left_out(monkeypatch, own):
    (own / "recipe" / "mine.yaml").rename(own / "recipe" / "tiny.yaml")
    with pytest.raises(UserError, match=r"recipe/tiny\.yaml has the name of a shipped file, .*: rename it"):
        typed(monkeypatch, train.main, "--config-dir", own, "recipe=tiny", "--cfg", "job")


def test_a_word_that_resembles_nothing_gets_no_advice():
    assert did_you_mean("xyz", ["seed", "model"]) == ""


@pytest.fixture
def own(tmp_path):
    """A folder with a space in its name, which holds a recipe and a prompt."""
    folder = tmp_path / "my own"
    for group in ("recipe", "prompt"):
        (folder / group).mkdir(parents=True)
        text = (CONFIGS / group / "mini_r1.yaml").read_text(encoding="utf-8")
        (folder / group / "mine.yaml").write_text(
            text.replace("name: mini_r1", "name: mine").replace("prompt: mini_r1", "prompt: mine"), encoding="utf-8"
        )
    return folder


@pytest.mark.slow
def test_own_configurations_are_taken_by_every_command_that_has_the_group(monkeypatch, capsys, own):
    for main in (train.main, plan.main):
        typed(monkeypatch, main, "--config-dir", own, "recipe=mine", "model=qwen2.5_0.5b", "--cfg", "job")
        printed = capsys.readouterr().out
        assert "\nrecipe_name: mine\n" in printed
        assert "\n  name: mine\n" in printed  # the prompt
    cfg, refused = doctor.configuration([f"--config-dir={own}", "recipe=mine"], gpu=False)
    assert (refused, cfg.recipe_name) == (None, "mine")
    typed(monkeypatch, data_command.main, "--config-dir", own, "prompt=mine", "--cfg", "job")
    assert "\n  name: mine\n" in capsys.readouterr().out
    problem = ["numbers=[1,2]", "target=3", "max_tokens=1", "model=assets/tiny_base"]
    typed(monkeypatch, play.main, "--config-dir", own, "prompt=mine", *problem)  # a key with the name of a group
    assert "[1, 2] to 3" in capsys.readouterr().out
    with pytest.raises(UserError, match="prompt/mine"):
        typed(monkeypatch, play.main, "prompt=mine", *problem)


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    for main in (train.main, data_command.main, entry.main):
        typed(monkeypatch, main, "--version")
    lines = capsys.readouterr().out.split()
    assert len(lines) == 3
    assert {f'version = "{each}"' for each in lines} <= set((ROOT / "pyproject.toml").read_text("utf-8").splitlines())


NEEDED = dict.fromkeys(("bench", "evaluate", "fetch", "play"), "model=qwen2.5_0.5b")
NEEDED |= {"export": "run=x", "render": "tokenizer=x", "report": "x", "submit": "http://127.0.0.1:1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*entry.COMMANDS} - {"score"}))  # score has no configuration
def test_cfg_job_prints_the_configuration_of_every_command_and_starts_nothing(monkeypatch, capsys, name):
    try:
        typed(monkeypatch, entry.main, name, *filter(None, [NEEDED.get(name)]), "--cfg", "job")
    except SystemExit as end:
        assert not end.code  # noqa: PT017  some commands end so, and some return
    printed = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(printed, dict)
    assert printed.get("runs") == (["x"] if name == "report" else None)


def test_cfg_asks_for_the_job_alone_and_a_folder_may_have_its_name(monkeypatch, capsys):
    with pytest.raises(UserError, match="--cfg hydra: write `--cfg job`"):
        typed(monkeypatch, entry.main, "report", "--cfg", "hydra")
    typed(monkeypatch, entry.main, "report", "job", "--cfg=job")
    assert yaml.safe_load(capsys.readouterr().out)["runs"] == ["job"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("countdown-zero tr", {"traces", "train"}),
        ("countdown-zero doctor hardware=h100_", {"hardware=h100_x1", "hardware=h100_x4", "hardware=h100_x8"}),
        ("countdown-zero evaluate temp", {"temperature="}),
        ("countdown-zero evaluate topology=", {f"topology={name}" for name in options("topology")}),
        ("countdown-zero data preset.targ", {"preset.targets."}),
    ],
)
def test_the_tab_key_completes_in_a_real_shell(tmp_path, line, known):
    program = tmp_path / "countdown-zero"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m verl_recipes "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = (
        'eval "$(countdown-zero -sc install=bash)"; COMP_LINE=$1 COMP_POINT=${#1}; COMP_WORDS=($1)\n'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); hydra_bash_completion; complete -p countdown-zero >&2\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", script, "bash", line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert set(result.stdout.split()) == known, result.stderr
    assert "hydra_bash_completion" in result.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh"), key=str), ids=lambda path: path.stem)
def test_a_scripts_help_is_its_story_and_nothing_is_made(script):
    if script.stem == "common":
        return
    result = subprocess.run(["bash", str(script), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    story = script.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
    assert result.stdout.startswith(story)
    assert "#!/" not in result.stdout


SCHEMAS = {  # of the commands whose every key is this project's; the others: test_data, test_traces and test_refusals
    "bench": ("bench", SamplingKeys, CONFIGS / "commands"),
    "evaluate": ("evaluate", evaluate.Keys, CONFIGS / "commands"),
    "export": ("export", export.Keys, CONFIGS),
    "fetch": ("fetch", fetch.Keys, CONFIGS / "commands"),
    "play": ("play", play.Keys, CONFIGS / "commands"),
    "render": ("render", RenderKeys, CONFIGS),
    "report": ("report", ReportKeys, CONFIGS),
    "runs": ("runs", runs.Keys, CONFIGS),
    "tiny-base": ("tiny_base", tiny_base.Keys, CONFIGS),
    "middle-base": ("middle_base", middle_base.Keys, CONFIGS / "commands"),
    "warm-start": ("warm_start", warm_start.Keys, CONFIGS / "commands"),
}
REQUIRED = NEEDED | {"report": "runs=[x]"}
EVERY_KEY = [(name, key) for name, (_, keys, _) in SCHEMAS.items() for key in keys.model_fields]


@cache
def configuration(name):
    config, _, folder = SCHEMAS[name]
    return cli.compose(config, [each for each in [REQUIRED.get(name)] if each], folder=folder)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.sampled_from(EVERY_KEY), VALUES)
def test_any_value_of_any_key_of_a_command_is_valid_or_refused_in_one_line_that_names_it(name_key, value):
    name, key = name_key
    cfg, keys, said = copy.deepcopy(configuration(name)), SCHEMAS[name][1], ""
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    try:
        with cli.in_one_line():
            cli.check(cfg, keys)
            cli.check(cfg, keys)  # what was converted is valid
    except UserError as error:
        said = str(error).removeprefix("error: ")
    assert not said or (re.search(rf"(^|; ){re.escape(key)}[=:.]", said) and "\n" not in said)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, key in EVERY_KEY if SCHEMAS[name][1].model_fields[key].annotation is bool]
)
def test_every_boolean_of_every_command_is_read_as_yaml_reads_it(name, key):
    cfg = copy.deepcopy(configuration(name))
    for value, meant in (("no", False), ("off", False), ("n", False), ("false", False), ("yes", True), (0, False)):
        cfg[key] = value
        cli.check(cfg, SCHEMAS[name][1])
        assert cfg[key] is meant
    cfg[key] = "maybe"
    with pytest.raises(UserError, match=f"{key}=maybe: should be a valid boolean"):
        cli.check(cfg, SCHEMAS[name][1])


@pytest.mark.slow
def test_a_small_file_of_ones_own_needs_no_sizes(monkeypatch, capsys, tmp_path):
    rows = "".join(f'"[{a}, {a + 1}, 3]",{2 * a + 4}\n' for a in range(1, 201))
    (tmp_path / "mine.csv").write_text(f"nums,target\n{rows}", encoding="utf-8")
    source = ["source=local", f"source.paths={tmp_path / 'mine.csv'}", f"out={tmp_path / 'data'}"]
    typed(monkeypatch, data_command.main, *source)
    made, note = capsys.readouterr().out.splitlines()
    tests = made.partition(" training and ")[2].partition(" ")[0]
    assert note == f"test_size=up to 1024: only {tests} problems are on the test side"
    with pytest.raises(UserError, match="test_size=1,024, but only"):  # a size that was asked for is kept
        typed(monkeypatch, data_command.main, *source, "test_size=1024")
