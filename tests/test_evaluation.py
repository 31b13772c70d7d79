"""Evaluations, exported models and the game: properties, and the real thing once."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Command
from configurations import compose
from omegaconf import OmegaConf
from rich.console import Console
from test_data import prepare
from test_measure import sample

from data_prep import cli
from data_prep.cli import CONFIGS, UserError, check, quoted
from data_prep.solver import solve
from reward_score.figures import interval
from verl_recipes import evaluate, export, play
from verl_recipes.measure.evaluation import measure
from verl_recipes.run import evaluation
from verl_recipes.run.folder import RunFolder, as_lines, read_lines, write_whole
from verl_recipes.run.weights import find_weights

ROOT = CONFIGS.parent
BASE = ROOT / "assets" / "tiny_base"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with 24 test problems, and a set out of distribution with 12."""
    folder = tmp_path_factory.mktemp("data") / "data"
    ood = ["ood=standard", "ood.names=[needs_product]", "ood.size=12"]
    arguments = [f"out={folder}", "train_size=64", "test_size=24", *ood]
    subprocess.run([sys.executable, "-m", "data_prep", *arguments], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_every_wanted_response_has_its_own_seed(data):
    files = evaluation.find_data(str(data))
    assert [file.name for file in files] == ["test.parquet", "ood_needs_product.parquet"]
    rows = evaluation.rows_to_answer(files, 3, 0.7, True, seed=1)
    assert len({evaluation.sample_key(row) for row in rows}) == len(rows) == 36 * 4
    sampling = [row["extra_info"]["sampling"] for row in rows]
    assert len({each["seed"] for each in sampling}) == len(rows)
    assert [each["temperature"] for each in sampling[:4]] == [0.0, 0.7, 0.7, 0.7]
    assert "difficulty" in rows[0]["extra_info"]


def test_the_longest_prompt_of_the_data_fits_a_model_of_no_run_and_its_response_the_context(tmp_path):
    """Unless the length is named; tokens are those of the model's tokenizer, as SmolLM2's prompts were too long."""
    prompts = [[{"role": "user", "content": ")(" * half}] for half in (5, 100)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "test.parquet")
    cfg = OmegaConf.create({"model": str(BASE), "overrides": []})
    of_model = {"custom_chat_template": None, "trust_remote_code": False}
    lengths = {"max_prompt_length": 128, "max_response_length": 9999, "apply_chat_template_kwargs": {}}
    for overrides, prompt, response in (([], 200, 256), (["data.max_prompt_length=128"], 128, 9999)):
        training = OmegaConf.create({"data": lengths, "actor_rollout_ref": {"model": of_model}})
        cfg.overrides = overrides
        evaluation.make_room_for_prompts(training, cfg, BASE, [tmp_path / "test.parquet"])
        assert (training.data.max_prompt_length, training.data.max_response_length) == (prompt, response)


def test_responses_of_commands_that_were_killed_are_kept(tmp_path):
    def response(index):
        return {"extra_info": {"set": "test", "index": index, "sample": 1}, "response": f"of problem {index}\u2028"}

    new = tmp_path / "samples" / "validation" / "0.jsonl"
    for index in (0, 1):
        write_whole(new, as_lines([response(index)]))
        assert len(evaluation.collect(RunFolder(tmp_path))) == index + 1
        assert not new.exists()
    assert evaluation.collect(RunFolder(tmp_path))["test", 1, 1] == response(1)


def test_a_model_is_found_in_a_run_a_checkpoint_or_a_folder(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "global_step_20"
    (checkpoint / "actor").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    for path in (tmp_path, checkpoint, checkpoint / "actor"):
        assert find_weights(path) == checkpoint / "actor"
    (tmp_path / "model").mkdir()
    for steps, weights in ((20, tmp_path / "model"), (10, checkpoint / "actor")):  # the run went on after step 10
        (tmp_path / "summary.json").write_text(json.dumps({"steps": steps}))
        assert find_weights(tmp_path) == weights
    assert find_weights(BASE) == BASE
    assert find_weights(Path("Qwen/Qwen2.5-3B")) == Path("Qwen/Qwen2.5-3B")


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory):
    """What a run leaves that an export needs; its model is the tiny base."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    (folder / "samples" / "validation").mkdir(parents=True)
    shutil.copytree(BASE, folder / "model")
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    cfg = compose("train", *files, f"run_dir={folder}")
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    rows = [sample(problem, problem % 2) for problem in range(16)]
    write_whole(folder / "samples" / "validation" / "0.jsonl", as_lines(rows))
    RunFolder(folder).write_mark("run")
    return folder


def refused(module, message, *arguments):
    result = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_nothing(data, tmp_path):
    refused("verl_recipes.evaluate", "holds no model", f"model={ROOT}", f"data={data}", f"out={tmp_path / 'out'}")
    base, parts = f"model={ROOT / 'assets' / 'tiny_base'}", "tensor_model_parallel_size=3"
    key = f"actor_rollout_ref.rollout.{parts}"
    refused("verl_recipes.evaluate", f"{parts} does not divide 2", base, f"data={data}", f"out={tmp_path / 'out'}", key)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no finished evaluation"):
        evaluate.show_comparison(tmp_path, tmp_path, Console())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny", "tinyzero_ppo", "mini_r1", "datawhale_r1"])  # the others have one of theirs
def test_a_model_is_measured_with_the_prompt_and_the_lengths_of_the_recipe(recipe, tmp_path):
    cfg = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml")
    cfg.merge_with({"overrides": [f"recipe={recipe}"], "hardware": "a800_x4", "model": "Some/Model"})
    files = [tmp_path / "test.parquet"]
    composed = evaluation.training_config(cfg, find_weights(Path(cfg.model)), files, RunFolder(tmp_path))
    model = "tiny" if recipe == "tiny" else "qwen2.5_3b"
    trained = compose("train", f"recipe={recipe}", f"model={model}", "hardware=a800_x4")
    assert composed.actor_rollout_ref.model.path == "Some/Model"
    assert composed.prompt == trained.prompt
    assert composed.data.max_response_length == trained.data.max_response_length
    assert composed.data.max_prompt_length == max(trained.data.max_prompt_length, cfg.max_prompt_length)


@pytest.mark.slow
def test_a_hubs_model_has_neither_the_tiny_models_lengths_nor_a_cpu_unasked_and_the_datas_prompt(tmp_path, monkeypatch):
    prepare(tmp_path / "data", "prompt=mini_r1", "train_size=20", "test_size=4", "annotate=no")
    cfg = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml")
    cfg.merge_with({"model": "Some/Model", "hardware": "a800"})
    composed = evaluation.training_config(
        cfg, find_weights(Path(cfg.model)), [tmp_path / "data/test.parquet"], RunFolder(tmp_path)
    )
    data, template = composed.data, composed.actor_rollout_ref.model.custom_chat_template
    assert (data.max_prompt_length, data.max_response_length) == (cfg.max_prompt_length, evaluation.RESPONSE)
    assert template == compose("render", "prompt=mini_r1", "tokenizer=x").prompt.chat_template
    cfg.hardware = None
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "nvidia3"] if str(path) == "/dev" else [])
    with pytest.raises(UserError, match="hardware= is missing: this machine has a GPU"):
        evaluation.hardware_of(cfg)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.5), ("weights", {"model.safetensors": "b"})])
def test_a_folder_with_another_evaluation_is_refused_key_by_key(tmp_path, key, value):
    wanted = {"temperature": 1.0, "weights": {"model.safetensors": "a"}}
    cfg, out = OmegaConf.create({"fresh": False}), RunFolder(tmp_path)
    for _ in range(2):
        evaluation.begin(cfg, out, wanted, Console())
    with pytest.raises(UserError, match=rf"holds another evaluation: {key}\S* was \S+ and is \S+ now"):
        evaluation.begin(cfg, out, wanted | {key: value}, Console())


def test_an_export_samples_as_training_did_whatever_the_base_says():
    from transformers import GenerationConfig

    training = compose("train")
    training.actor_rollout_ref.rollout.update({"temperature": 0.7, "top_p": 0.8, "top_k": 20})
    base = {"do_sample": False, "top_k": 5, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.1}
    made = GenerationConfig(**base, eos_token_id=261)
    made.update(**export.generation_settings(training))
    assert (made.do_sample, made.temperature, made.top_p, made.top_k) == (True, 0.7, 0.8, 20)
    assert (made.min_p, made.typical_p, made.repetition_penalty, made.eos_token_id) == (None, None, 1.0, 261)


@pytest.mark.slow
def test_the_chat_template_and_its_options_are_those_of_the_data_or_of_the_prompt_that_is_named(run_dir, tmp_path):
    prompt = OmegaConf.to_container(compose("render", "prompt=chat_thinking", "tokenizer=x").prompt)
    made = {"configuration": {"prompt": prompt}, "files": {"x": {}}, "versions": {"countdown-zero": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    cfg = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml")
    for model, overrides, expected in (
        ("Some/Model", [], True),
        (str(run_dir), [], True),
        ("Some/Model", ["prompt=chat"], False),
        (str(run_dir), ["prompt=chat"], False),
    ):
        cfg.merge_with({"overrides": overrides, "hardware": "cpu", "model": model})
        composed = evaluation.training_config(cfg, BASE, [tmp_path / "test.parquet"], RunFolder(tmp_path))
        assert composed.data.apply_chat_template_kwargs == {"enable_thinking": expected}
        assert composed.actor_rollout_ref.model.custom_chat_template is None


@pytest.mark.slow
def test_a_model_that_brings_code_is_not_evaluated_unless_it_is_trusted(data, tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "code.Model"}}))
    arguments = [f"model={tmp_path / 'model'}", f"data={data}", f"out={tmp_path / 'out'}"]
    refused("verl_recipes.evaluate", "asks to run code", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_gpu_too_the_longest_prompt_fits_a_model_of_no_run(monkeypatch, tmp_path):
    row = {"data_source": "x", "prompt": [{"role": "user", "content": ")(" * 100}], "reward_model": {"style": "rule"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    options = [f"model={BASE}", f"data={tmp_path}", f"out={tmp_path / 'out'}", "name=x", "hardware=h100"]
    monkeypatch.setattr(evaluation, "check_start", lambda *_, **__: {})

    def started(training, *_, **__):
        raise EOFError(training.data.max_prompt_length)

    monkeypatch.setattr(evaluation, "start_verl", started)
    cfg = cli.compose("evaluate", options, folder=CONFIGS / "commands")
    with pytest.raises(EOFError, match="200"):
        evaluation.evaluate(cfg, RunFolder(cfg.out), Console(quiet=True))


def test_a_checkpoints_run_and_step_are_found_from_within_it_and_through_a_link(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    (checkpoint := run.checkpoints / "global_step_20").mkdir(parents=True)
    run.write_mark("run")
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for path in (Path(), tmp_path / "best", checkpoint):
        found, step = export.find_run(path)
        assert (found.path.resolve(), step) == (run.path.resolve(), 20)


def test_a_complete_run_without_checkpoints_is_exported_as_its_last_step(tmp_path):
    run = RunFolder(tmp_path)
    run.write_mark("run")
    run.summary.write_text(json.dumps({"steps": 30}))
    assert export.find_run(tmp_path)[1] == 30


@pytest.mark.slow
def test_a_checkpoint_whose_run_gave_all_the_rest_to_responses_is_measured(tmp_path):
    actor = tmp_path / "checkpoints" / "global_step_2" / "actor"
    shutil.copytree(BASE, actor / "huggingface")
    (actor / "fsdp_config.json").write_text("{}")
    OmegaConf.save(compose("train", "data.max_response_length=480"), tmp_path / "config.yaml", resolve=True)
    RunFolder(tmp_path).write_mark("run")
    cfg = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml")
    cfg.merge_with({"model": str(actor), "hardware": "cpu"})
    training = evaluation.training_config(cfg, actor, [tmp_path / "test.parquet"], RunFolder(tmp_path / "out"))
    assert training.data.max_prompt_length == 32


@pytest.mark.slow
def test_two_files_of_samples_are_compared_set_by_set(tmp_path):
    for name, right in (("a", 0), ("b", 1)):
        rows = [sample(problem, right, set=each) for each in ("test", "ood_x") for problem in range(12)]
        (tmp_path / name).write_text(as_lines(rows), encoding="utf-8")
    command = [sys.executable, "-m", "verl_recipes.evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    cells = {line[0]: line[1:] for each in result.stdout.splitlines() if (line := each.replace("│", " ").split())}
    for each in ("test", "ood_x"):
        assert (cells[each][0], cells[each][-4:]) == ("12", ["12,", "0", "<", "0.001"])


@pytest.mark.slow
def test_other_mistakes_are_one_line_too(tmp_path, run_dir):
    with pytest.raises(UserError, match=r"holds no test.parquet and no ood_\*.parquet"):
        evaluation.find_data(str(tmp_path))
    with pytest.raises(UserError, match="two files have the same name"):
        evaluation.find_data(["a/test.parquet", "b/test.parquet"])
    shutil.copytree(run_dir / "samples", tmp_path / "samples")
    assert len(evaluate.last_samples(tmp_path)) == 16
    RunFolder(tmp_path).write_mark("evaluation")
    with pytest.raises(UserError, match="no finished evaluation"):
        evaluate.last_samples(tmp_path)
    with pytest.raises(UserError, match="neither a run's folder nor in one"):
        export.export(tmp_path.parent, tmp_path / "out", "bfloat16")
    with pytest.raises(UserError, match="dtype=int4: should be 'bfloat16', 'float16' or 'float32'"):
        check(compose("export", f"run={run_dir}", "dtype=int4"), export.Keys)
    with pytest.raises(UserError, match="exists"):
        export.export(run_dir, tmp_path, "bfloat16")
    with pytest.raises(UserError, match="Could not find 'prompt/nope'"):
        play.find_prompt("nope", BASE, BASE)
    for line in ("", "1 2 3", "= 5", "1 = 5", "1 2 = 3 4", "1 2 = ", "a b = c", "1 2 = 3 = 4", "1+2 = 3"):
        with pytest.raises(UserError, match="is no problem"):
            play.read_problem(line)


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """The export in each precision."""
    folders = {dtype: tmp_path_factory.mktemp("export") / dtype for dtype in ("float32", "bfloat16")}
    for dtype, folder in folders.items():
        export.export(run_dir, folder, dtype)
    return folders


@pytest.mark.slow
def test_an_export_holds_the_weights_the_tokenizer_and_the_template_of_the_run(run_dir, exported):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (exported["float32"] / "tokenizer.json").read_bytes() == (run_dir / "model" / "tokenizer.json").read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    messages = [{"role": "user", "content": "Using the numbers [11, 18, 25], create an equation that equals 175.\n"}]
    run_tokenizer = AutoTokenizer.from_pretrained(BASE)
    for dtype, folder in exported.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert model.dtype == getattr(torch, dtype)
        assert all(torch.equal(theirs[name].to(model.dtype), value) for name, value in model.state_dict().items())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        expected = run_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
        assert tokenizer.chat_template == OmegaConf.load(run_dir / "config.yaml").prompt.chat_template
        assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (256, 261)
        assert model.generation_config.do_sample  # by temperature 1, as in training; the base's own file says nothing


@pytest.mark.slow
def test_the_model_card_is_filled_from_the_run(exported):
    card = (exported["bfloat16"] / "README.md").read_text()
    results = [sample(problem, problem % 2) for problem in range(16)]
    assert f"| mean@1 | {interval(measure(results)['figures']['mean@1'])} |" in card
    assert "Using the numbers {numbers}, create an equation that equals {target}" in card
    assert "| precision of this export | bfloat16 |" in card
    assert "train.parquet 64" in card
    assert "{{" not in card
    assert "{'" not in card
    assert "['" not in card
    assert "license: apache-2.0" in card.split("---")[1]
    assert "None" not in card.split("## Data")[1]


@pytest.mark.slow
def test_a_model_card_says_which_options_of_the_chat_template_a_server_needs(run_dir):
    training = OmegaConf.load(run_dir / "config.yaml")
    training.data.apply_chat_template_kwargs = {"enable_thinking": False}
    card = export.model_card(RunFolder(run_dir.parent), 3, training, "name", "float16")
    assert """`vllm serve FOLDER --default-chat-template-kwargs '{"enable_thinking": false}'`""" in card


@pytest.mark.slow
def test_a_model_card_says_what_is_not_known(run_dir):
    """Data or a base that has gone, a step without an evaluation, a run older than the prompts in its configuration."""
    training = OmegaConf.load(run_dir / "config.yaml")
    training.actor_rollout_ref.model.path = "/models/gone"
    training.data.train_files = ["gone/train.parquet"]
    del training.prompt
    card = export.model_card(RunFolder(run_dir.parent), 3, training, "name", "float16")
    assert "No manifest was beside them." in card
    assert "This run has not measured this step." in card
    assert "whose card was not at hand: look it up" in card
    assert "base_model" not in card


@pytest.mark.parametrize("text", [b"---\nlicense: [a\n---\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_base_whose_card_cannot_be_read_has_no_known_licence(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert export.base_of(str(tmp_path)) == {"name": None, "licence": None}


@pytest.mark.slow
def test_the_game_ends_with_a_verdict_that_training_would_give(exported, monkeypatch, capsys):
    """A mistake in a line ends nothing, an empty line ends the game."""
    lines = iter(["3 4 5", "3 4 5=12", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(lines))
    monkeypatch.setattr(sys, "argv", ["play", f"model={exported['bfloat16']}", "temperature=0", "max_tokens=24"])
    play.main()
    printed = capsys.readouterr().out
    assert "error: '3 4 5' is no problem" in printed
    response, verdict = printed.split("[3, 4, 5] to 12\n")[1].rstrip().rsplit("\n\n", 1)
    assert "=" in response
    assert verdict == play.verdict(response, [3, 4, 5], 12)


def test_an_evaluation_goes_on_with_other_room_and_not_with_another_reward(tmp_path):
    cfg, out = OmegaConf.create({"fresh": False}), RunFolder(tmp_path)
    for overrides in ([], ["force=true"], ["actor_rollout_ref.rollout.gpu_memory_utilization=0.4"]):
        evaluation.begin(cfg, out, {"overrides": overrides}, Console())
    (file := tmp_path / "mine.py").write_text("a = 1", encoding="utf-8")
    training = compose("train", f"reward.custom_reward_function.path={quoted(file)}")
    wanted = evaluation.decided(training)  # an evaluation that was begun earlier has recorded none
    evaluation.begin(cfg, out, {"overrides": []} | wanted, Console())
    file.write_text("a = 2", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds another evaluation: reward\..*mine\.py was "):
        evaluation.begin(cfg, out, {"overrides": []} | evaluation.decided(training), Console())
    training.data.apply_chat_template_kwargs = {"enable_thinking": True}
    assert evaluation.decided(training)["settings"] != wanted["settings"]


def test_the_problem_that_play_suggests_is_one_and_the_same_everywhere_and_has_a_solution():
    numbers, target = play.read_problem(play.EXAMPLE)
    assert solve(numbers, target)
    files = [Path(play.__file__), CONFIGS / "commands" / "play.yaml"]
    pages = [CONFIGS.parent / folder / "evaluation.md" for folder in ("docs", "docs/zh")]
    for file in files + pages:
        typed = re.findall(r"numbers=\[([\d,]+)\] target=(\d+)", file.read_text("utf-8"))
        assert typed == [(",".join(map(str, numbers)), str(target))], file
    assert all(play.ASK in page.read_text("utf-8") for page in pages)


@pytest.mark.slow
def test_one_problem_is_played_without_a_question(run_dir, capsys):
    """A run's folder as it is; the prompt is the run's."""
    cfg = OmegaConf.load(CONFIGS / "commands" / "play.yaml")
    player = play.Player(OmegaConf.merge(cfg, {"model": str(run_dir), "temperature": 0, "max_tokens": 3}))
    assert player.prompt["name"] == "tinyzero_base"
    assert player.options["repetition_penalty"] == 1.0
    player.play([1, 2, 3], 7)
    assert "no_answer (reward 0): the thought never ends" in capsys.readouterr().out


def test_play_explains_the_verdict_and_shows_a_solution():
    right = play.verdict("</think><answer>(18-11)*25</answer>", [11, 18, 25], 175)
    assert right == "right (reward 1): '(18-11)*25' (characters 16 to 25): its value is 175, the target"
    wrong = play.verdict("</think><answer>8*3</answer>", [3, 3, 8, 8], 24)
    assert "wrong_numbers (reward 0.1)" in wrong
    assert wrong.endswith("a solution: 8 / (3 - 8 / 3) = 24 (one of 1)")
    assert "there is no solution" in play.verdict("", [1, 1], 90)
    assert "the solver cannot tell: 2 to 6" in play.verdict("", [1] * 9, 3)


def test_what_a_model_writes_does_not_drive_the_terminal():
    assert play.printable("\x1b[2J\r\x07\u202eevil\nnext") == "\\x1b[2J\\r\\x07\\u202eevil\nnext"


@pytest.mark.parametrize("name", ["results.md.jinja", "results.zh.md.jinja"])
def test_the_results_page_is_what_its_script_makes_of_the_measured_files(name):
    """And each file says what command made it, of which code."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    measured = results.load()
    assert (ROOT / results.PAGES[name]).read_text() == results.page(name, measured)
    for each in measured.values():
        assert each["command"].startswith("python -m verl_recipes.evaluate ")
        assert {"versions", "git_commit", "cost", "confidence"} <= each.keys()


@pytest.mark.parametrize("name", ["docs/evaluation.md", "docs/zh/evaluation.md"])
def test_the_evaluation_page_lists_every_figure_and_option(name):
    text = (ROOT / name).read_text()
    figures = measure([sample(0, True), sample(1, False)])["figures"]
    options = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml").keys() - {"name", "defaults", "hydra"}
    for each in {figure.replace("@1", "@n") for figure in figures if not figure.startswith("pass")} | options:
        assert f"`{each}`" in text or f"{each}=" in text


@pytest.fixture(scope="module")
def evaluation_of_run(resumed, small_data, tmp_path_factory):
    """An evaluation of a run, killed with its process group after the first batch and started again.

    Of 48 problems in three sets, each sampled four times and once greedily. Every second response of the killed one is
    taken away, so that the next one writes it anew, in batches of other problems. The prompts of a batch together have
    more tokens than vLLM may compute at once.
    """
    folder, data = tmp_path_factory.mktemp("evaluation") / "killed", Path(small_data[0].partition("=")[2]).parent

    def start():
        arguments = [f"model={quoted(resumed['run_dir'])}", f"data={data}", f"out={folder}", "n=4", "batch=16"]
        arguments += [f"actor_rollout_ref.rollout.{key}" for key in ("max_model_len=384", "max_num_batched_tokens=384")]
        return Command(sys.executable, "-m", "verl_recipes.evaluate", *arguments)

    written = folder / "samples" / "validation" / "0.jsonl"
    first = start()
    first.wait_for(written.exists)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.communicate()
    first.wait_for_processes()  # they may write one batch more before they notice that they are alone
    rows = read_lines(written)
    write_whole(written, as_lines(rows[::2]))
    second = start()
    assert second.wait() == 0, second.output
    second.assert_nothing_is_left()
    return {"folder": folder, "killed": rows, "output": second.output}


@pytest.mark.end_to_end
def test_a_killed_evaluation_continues_and_one_seed_gives_one_result(evaluation_of_run):
    folder, killed = evaluation_of_run["folder"], evaluation_of_run["killed"]
    assert len(killed) in (80, 160)  # whole batches
    assert int(re.search(r"(\d+) of 240\s+responses are there", evaluation_of_run["output"])[1]) == len(killed) / 2
    rows = {kind: read_lines(folder / "samples" / kind / "0.jsonl") for kind in ("validation", "greedy")}
    assert {kind: len(each) for kind, each in rows.items()} == {"validation": 192, "greedy": 48}
    final = {evaluation.sample_key(row): row for each in rows.values() for row in each}
    assert len(final) == 240
    for row in killed:  # the identifier of a prompt becomes that of its problem
        again = final[evaluation.sample_key(row)]
        assert row | {"prompt_id": again["prompt_id"]} == {name: again[name] for name in row}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["cost"]["response tokens"] == sum(row["response_tokens"] for row in final.values())
    assert summary["by"]["set"].keys() == {"test", "ood_5_numbers", "ood_needs_product"}
    assert {path.name for path in (folder / "samples").iterdir()} == {"events.jsonl", "greedy", "validation"}


@pytest.mark.end_to_end
def test_evaluate_measures_a_run_as_the_run_measured_itself(evaluation_of_run, resumed):
    theirs = json.loads((resumed["run_dir"] / "summary.json").read_text())["trained"]
    folder = evaluation_of_run["folder"]
    whole = json.loads((folder / "summary.json").read_text())
    assert whole["by"]["set"]["test"]["problems"] == theirs["problems"] == 16
    rows = [
        row for row in read_lines(folder / "samples" / "validation" / "0.jsonl") if row["extra_info"]["set"] == "test"
    ]
    assert len(rows) == 16 * 4
    assert abs(fmean(row["response_tokens"] for row in rows) - theirs["response_tokens"]) < 8
    assert whole["pass@4"] >= whole["pass@2"] >= whole["mean@4"] == pytest.approx(whole["pass@1"])


@pytest.mark.long
@pytest.mark.end_to_end
def test_a_server_of_the_exported_model_writes_what_the_rollout_engine_wrote(evaluation_of_run, resumed, tmp_path):
    export.export(resumed["run_dir"], tmp_path / "model", "float32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", "--max-model-len=512", "--dtype=float32"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    vllm = str(Path(sys.executable).with_name("vllm"))
    server = Command("env", *map("=".join, environment.items()), vllm, "serve", tmp_path / "model", *options)
    try:
        address = f"http://127.0.0.1:{port}"

        def ready():
            try:
                return urllib.request.urlopen(f"{address}/health", timeout=1).status == 200
            except OSError:
                return False

        server.wait_for(ready, timeout=300)
        rows = read_lines(evaluation_of_run["folder"] / "samples" / "greedy" / "0.jsonl")
        for row in rows:
            content = {"role": "user", "content": row["prompt"]}
            body = {"model": str(tmp_path / "model"), "messages": [content], "temperature": 0, "max_tokens": 64}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
            assert answer["choices"][0]["message"]["content"] == row["response"]
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.communicate(timeout=60)
        time.sleep(1)


SAMPLING = evaluation.SamplingKeys.model_fields.keys() - {"batch", "fresh", "name", "out"}


@pytest.mark.parametrize("key", sorted(SAMPLING))
def test_an_evaluation_with_another_value_of_any_key_is_another_one(key):
    cfg = OmegaConf.load(CONFIGS / "commands" / "evaluate.yaml")
    other = OmegaConf.merge(cfg, {key: ["x"] if key == "overrides" else "another"})
    assert evaluation.identity(cfg, {}, {}) != evaluation.identity(other, {}, {})


def test_another_seed_gives_every_response_another_seed(tmp_path):
    pq.write_table(pa.table({"prompt": ["x"] * 8}), tmp_path / "test.parquet")
    both = [evaluation.rows_to_answer([tmp_path / "test.parquet"], 4, 1.0, True, seed) for seed in (0, 1)]
    one, other = ({row["extra_info"]["sampling"]["seed"] for row in rows} for rows in both)
    assert not one & other


def test_figures_are_of_all_responses_or_there_are_none(monkeypatch, tmp_path):
    truth = {"style": "rule", "ground_truth": {"numbers": [1, 2, 3], "target": 6}}
    row = {"data_source": "x", "prompt": [{"role": "user", "content": ")("}], "reward_model": truth}
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "test.parquet")
    monkeypatch.setattr(evaluation, "check_start", lambda *_, **__: {})

    def start(training, out, *_, **__):
        asked = pq.read_table(out.path / evaluation.PENDING).to_pylist()
        said = {"response": "", "acc": 0.0, "ground_truth": truth["ground_truth"], "response_tokens": 0}
        write_whole(out.samples_of("validation", 0), as_lines([each | said for each in asked][1:]))

    monkeypatch.setattr(evaluation, "start_verl", start)
    options = [f"model={BASE}", f"data={quoted(tmp_path)}", f"out={quoted(tmp_path / 'out')}", "name=x", "n=1"]
    cfg = cli.compose("evaluate", [*options, "hardware=cpu"], folder=CONFIGS / "commands")
    with pytest.raises(UserError, match="verl left 1 of 6 rows without a response"):
        evaluation.evaluate(cfg, RunFolder(cfg.out), Console(quiet=True))
    assert not RunFolder(cfg.out).summary.exists()
    # It was begun, so it goes on; a new one of such a model is refused.
    monkeypatch.setattr(evaluation, "check_beginning", Mock(side_effect=UserError("no first token")))
    with pytest.raises(UserError, match="verl left 1 of 6 rows"):
        evaluation.evaluate(cfg, RunFolder(cfg.out), Console(quiet=True))
    with pytest.raises(UserError, match="no first token"):
        evaluation.evaluate(cfg, RunFolder(tmp_path / "another"), Console(quiet=True))


def test_a_model_is_uploaded_as_private_as_was_asked(monkeypatch, tmp_path):
    made = []

    class Api:
        def create_repo(self, repository, **options):
            made.append(options.get("private"))

        def upload_folder(self, **_):
            return SimpleNamespace(repo_url="address")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    for private in (True, False):
        export.upload(tmp_path, "some/model", private)
    assert made == [True, False]


@pytest.mark.slow
def test_an_evaluation_by_weights_on_gpus_of_their_own_has_one_batch_a_step(tmp_path):
    """verl's trainer for topology=split asserts it, whatever the recipe's updates are."""
    cfg = cli.compose("evaluate", [f"model={BASE}", "hardware=h100"], folder=CONFIGS / "commands")
    cfg.overrides = ["gpus=4", "topology=split", "recipe=tinyzero_grpo"]
    out = RunFolder(tmp_path / "out")
    training = evaluation.training_config(cfg, BASE, [tmp_path / "test.parquet"], out)
    assert training.trainer.v1.separate_async.parameter_sync_step == 1
