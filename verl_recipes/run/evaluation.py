"""Samples a model by verl's own validation, and measures it: what `evaluate` and `bench` share (evaluate.py)."""

import re
import shutil
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import Field
from rich.console import Console

from data_prep.cli import (
    CONFIGS,
    Checked,
    Count,
    Number,
    PathText,
    Seed,
    Text,
    UserError,
    as_list,
    check,
    compose,
    overridden_key,
    quoted,
    refuse,
    same_command,
)
from data_prep.render import load_tokenizer, render
from reward_score.figures import CONFIDENCE
from verl_recipes.measure.evaluation import measure, summarize, what_is_missing
from verl_recipes.measure.problems import OUT
from verl_recipes.run.fingerprint import differences, flat, may_change, provenance, read_config, reward_of
from verl_recipes.run.folder import (
    RunFolder,
    as_lines,
    mark_of,
    read_json,
    read_lines,
    read_object,
    write_json,
    write_whole,
)
from verl_recipes.run.model import check_beginning, check_context, positions_of, small_files
from verl_recipes.run.preflight import check_parquet, check_prompt, check_prompt_lengths, check_start, manifest_beside
from verl_recipes.run.reward import check_reward
from verl_recipes.run.start import say, start_verl
from verl_recipes.run.trackers import check_trackers
from verl_recipes.run.weights import find_weights, hugging_face, run_of
from verl_recipes.settings.configuration import check_ranks  # the module also registers the resolvers
from verl_recipes.settings.schema import Name, TrainKeys

PENDING, ANSWERED = "pending.parquet", "answered.jsonl"
PROMPT_LENGTH, RESPONSE_LENGTH = "data.max_prompt_length", "data.max_response_length"
TEMPLATE, OPTIONS = "actor_rollout_ref.model.custom_chat_template", "data.apply_chat_template_kwargs"
RESPONSE = 1024  # tokens of the longest response, if neither a run nor generation_config.json sets it
Row = dict[str, Any]
# Keys of training that an evaluation sets itself, or that would make it another one's.
SET_HERE = (
    *("run_dir", "seeds", "warm_start", "eval_n", "actor_rollout_ref.model.path"),
    *(f"trainer.{key}" for key in ("default_local_dir", "restarts", "resume_mode")),
    *(f"data.{key}" for key in ("train_files", "val_files", "val_batch_size", "val_max_samples", "custom_cls.path")),
    "data.filter_overlong_prompts",
    *(f"actor_rollout_ref.rollout.val_kwargs.{key}" for key in ("n", "temperature", "do_sample")),
    *(f"trainer.v1.sampler.sampler_kwargs.{key}" for key in ("samples_dir", "checkpoints_dir")),
)


class SamplingKeys(Checked):
    """The keys of a command that samples a model."""

    model: PathText = Field(description="a Hugging Face folder or name, a run's folder, or a checkpoint of verl's")
    n: Count = Field(description="samples a problem")
    temperature: Number = Field(ge=0, description="of the samples")
    greedy: bool = Field(description="also one response to each problem at temperature 0")
    seed: Seed = Field(description="of the samples")
    batch: Count = Field(description="problems at once, until the longest response ends; a kill loses at most these")
    max_prompt_length: Count = Field(
        description="tokens, if the model's run allows fewer: other problems may be longer"
    )
    out: PathText = Field(description="folder to write; only what is missing there is done")
    name: Name | None = Field(description="of that folder; null: from model, data and seed")
    fresh: bool = Field(description="empty that folder first")
    hardware: Text | None = Field(description="null: the CPU, if the machine has no GPU")
    overrides: list[Text] = Field(description="keys and groups of training; those of the command line are added")


def name_of(model: str, what: str, seed: int) -> str:
    """The name of an evaluation's folder: of each part letters, digits and underscores.

    >>> name_of("runs/tiny-seed0/", "test", 0)
    'tiny_seed0-test-seed0'
    """
    return "-".join(re.sub(r"\W+", "_", part.removeprefix("runs/").strip("/")) for part in (model, what, f"seed{seed}"))


def find_data(data: str | ListConfig) -> list[Path]:
    """The parquet files of a folder of data_prep (test.parquet, ood_*.parquet), or those that were named."""
    if isinstance(data, str) and not data.endswith(".parquet") and not Path(data).exists():
        raise UserError(f"data={data}: there is no such folder; `python -m data_prep out={data}` makes one")
    if not isinstance(data, str) or not Path(data).is_dir():
        files = [Path(name) for name in as_list(data)]
        if len({file.stem for file in files}) < len(files):
            raise UserError("data: two files have the same name, which is the name of their set in all results")
        return files
    files = [*Path(data).glob("test.parquet"), *sorted(Path(data).glob(f"{OUT}*.parquet"))]
    if not files:
        raise UserError(f"data={data} holds no test.parquet and no {OUT}*.parquet; `python -m data_prep` makes them")
    return files


def identity(cfg: DictConfig, model: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    """Everything that the responses depend on: the settings, and the content of model and data (run/preflight.py)."""
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    names = ("model", "n", "temperature", "greedy", "seed", "hardware", "max_prompt_length", "overrides")
    return {name: config[name] for name in names} | {"weights": model, "files": files}


# What else decides responses and verdicts, and may change under the same names: by the data's manifest, or by a recipe
# or a reward of the user's own.
DECIDE = (RESPONSE_LENGTH, TEMPLATE, OPTIONS, "actor_rollout_ref.rollout.val_kwargs", "reward.custom_reward_function")


def decided(training: DictConfig) -> dict[str, Any]:
    """The values of DECIDE, and the hash of a reward function in a file."""
    config: dict[str, Any] = OmegaConf.to_container(training, resolve=True)  # type: ignore[assignment]
    return {
        "settings": {key: value for key, value in flat(config) if key.startswith(DECIDE)},
        "reward": reward_of(config),
    }


def lasting(overrides: Sequence[str]) -> list[str]:
    """The overrides without those that may change when a run goes on, too."""
    return [each for each in overrides if not may_change(overridden_key(each))]


def rows_to_answer(files: Sequence[Path], n: int, temperature: float, greedy: bool, seed: int) -> list[Row]:
    """A row for each response: samples 1 to n of each problem, and sample 0 at temperature 0 if `greedy`."""
    rows = []
    for file in files:
        for index, row in enumerate(pq.read_table(file).to_pylist()):
            for sample in range(0 if greedy else 1, n + 1):
                own_seed = zlib.crc32(f"{seed}/{file.stem}/{index}/{sample}".encode())
                sampling = {"seed": own_seed, "temperature": temperature if sample else 0.0}
                info = {"set": file.stem, "index": index, "sample": sample, "sampling": sampling}
                rows.append(row | {"extra_info": (row.get("extra_info") or {}) | info})
    return rows


def sample_key(row: Row) -> tuple[str, int, int]:
    """Test set, problem and sample: the same for a row and for its response."""
    info = row["extra_info"]
    return info["set"], info["index"], info["sample"]


def collect(out: RunFolder) -> dict[tuple[str, int, int], Row]:
    """All responses so far. They are moved to a file of their own, where verl does not overwrite them."""
    new, kept = out.samples_of("validation", 0), out.samples / ANSWERED
    rows = {sample_key(row): row for path in (kept, new) for row in read_lines(path)}
    if new.exists():
        write_whole(kept, as_lines(rows.values()))
        new.unlink()
    return rows


def hardware_of(cfg: DictConfig) -> str:
    """The option of `hardware`: the one that is set, or cpu on a machine without a GPU."""
    if cfg.hardware is None and any(Path("/dev").glob("nvidia[0-9]*")):  # a container may have another than the first
        raise UserError("hardware= is missing: this machine has a GPU; name an option for it, or hardware=cpu")
    return str(cfg.hardware or "cpu")


def longest_response(weights: Path, prompt: int) -> int:
    """Tokens of the longest response of a model that belongs to no run, limited by its context."""
    length = read_object(weights / "generation_config.json").get("max_new_tokens") or RESPONSE
    positions = positions_of(weights)
    return min(length, max(1, positions - prompt)) if positions else length


def training_config(cfg: DictConfig, weights: Path, files: Sequence[Path], out: RunFolder) -> DictConfig:
    """The configuration of a run that only evaluates: verl's trainer stops after its first validation.

    Unless they are set, the prompt comes from the data, and the lengths from the model's run or the model itself.
    """
    refuse(cfg.overrides, SET_HERE, "its own keys are model=, data=, n=, temperature=, greedy=, seed=, batch= and out=")
    agent = "actor_rollout_ref.rollout.agent"
    overrides = [
        "model=tiny" if "recipe=tiny" in cfg.overrides else "model=local",  # configs/model/tiny.yaml sets its lengths
        f"actor_rollout_ref.model.path={quoted(weights)}",
        f"hardware={hardware_of(cfg)}",
        f"seed={cfg.seed}",
        f"run_dir={quoted(out.path)}",
        "eval_n=1",  # each response is a row of its own
        f"actor_rollout_ref.rollout.val_kwargs.temperature={cfg.temperature}",
        f"{agent}.default_agent_loop=row_sampling",
        f"{agent}.agent_loop_config_path={quoted(CONFIGS / 'evaluate' / 'agent_loop.yaml')}",
        f"data.train_files={quoted(out.path / PENDING)}",
        f"data.val_files={quoted(out.path / PENDING)}",
        f"data.val_batch_size={cfg.batch * (cfg.n + cfg.greedy)}",
        "updates=1",  # a mini-batch is then a batch, and with topology=split one a step
        "trainer.resume_mode=disable",
        "data.custom_cls.path=null",  # a curriculum would choose among the rows
    ]
    training = compose("train", [*overrides, *cfg.overrides])
    named = set(map(overridden_key, cfg.overrides))
    run = run_of(Path(cfg.model))
    theirs = OmegaConf.create(read_config(run.config) if run and run.config.exists() else {})
    of_model = {PROMPT_LENGTH: cfg.max_prompt_length, RESPONSE_LENGTH: longest_response(weights, cfg.max_prompt_length)}
    if theirs:
        values = {key: OmegaConf.select(theirs, key) for key in (*of_model, TEMPLATE, OPTIONS)}
    else:
        values = {} if "recipe" in named else of_model  # a recipe sets its own lengths
    if {"recipe", "prompt"} & named:
        values = {key: value for key, value in values.items() if key in of_model}
    elif of_data := manifest_beside(files[0]).get("configuration", {}).get("prompt"):
        values |= {TEMPLATE: of_data.get("chat_template"), OPTIONS: of_data.get("template_options", {})}
    for key in values.keys() - named:
        OmegaConf.update(training, key, values[key], merge=False)
    least, positions = cfg.max_prompt_length, positions_of(weights)
    if theirs and positions:  # a run may have given all the rest to its responses
        least = min(least, positions - training.data.max_response_length)
    training.data.max_prompt_length = max(training.data.max_prompt_length, least)
    check(training, TrainKeys)
    return training


def make_room_for_prompts(training: DictConfig, cfg: DictConfig, weights: Path, files: Sequence[Path]) -> None:
    """Let the longest prompt of the data fit, unless a recipe or the user sets the lengths.

    Its tokenizer and template decide how long a prompt is. verl would end at the first that is too long, minutes later.
    """
    named = set(map(overridden_key, cfg.overrides))
    if {"recipe", PROMPT_LENGTH} & named:
        return
    folder, model = small_files(weights), training.actor_rollout_ref.model
    prompt = {"name": "null", "chat_template": model.custom_chat_template}
    tokenizer = load_tokenizer(str(folder), prompt, model.trust_remote_code)
    prompts = [prompt for file in files for prompt in pq.read_table(file, columns=["prompt"])["prompt"].to_pylist()]
    options = training.data.apply_chat_template_kwargs
    longest = max(len(render(tokenizer, prompt, **options)[1]) for prompt in prompts)
    training.data.max_prompt_length = max(training.data.max_prompt_length, longest)
    if RESPONSE_LENGTH not in named and not run_of(Path(cfg.model)):  # a run's responses keep their length
        training.data.max_response_length = longest_response(folder, training.data.max_prompt_length)


def begin(cfg: DictConfig, out: RunFolder, wanted: Row, console: Console) -> None:
    """Mark the folder as this evaluation's, or check that it already is."""
    out.check_kind("evaluation")
    if cfg.fresh:
        out.empty(partial(say, console), [cfg.model, *wanted["files"]])
    if before := mark_of(out.path):
        sides = [side | {"overrides": lasting(side.get("overrides") or [])} for side in (before, wanted)]
        # An evaluation that was begun earlier may lack a key.
        found = differences(*(dict(flat({key: side.get(key, wanted[key]) for key in wanted})) for side in sides))
        if found:
            raise UserError(
                f"{out.path} holds another evaluation: {'; '.join(found[:6])}. Choose another folder with out=, or "
                "fresh=true"
            )
    out.write_mark("evaluation", **wanted)


def evaluate(cfg: DictConfig, out: RunFolder, console: Console) -> Row:
    """Sample what is missing, score, measure and write; returns the summary."""
    files, weights = find_data(cfg.data), find_weights(Path(cfg.model))
    training = training_config(cfg, weights, files, out)
    check_ranks(training)
    if cfg.greedy and training.actor_rollout_ref.rollout.agent.default_agent_loop != "row_sampling":
        raise UserError(
            "greedy=true needs the agent loop row_sampling, which knows each row's temperature: set greedy=false"
        )
    check_trackers(training.trackers)
    check_reward(training)
    names = [str(file) for file in files]
    data = check_parquet(names, "data", training.data.made_by)
    check_prompt(names, training)
    has_prompt = run_of(Path(cfg.model)) or (weights / "prompt.json").exists()  # it was trained with it
    if not has_prompt and (cfg.fresh or not mark_of(out.path)):  # what was begun goes on
        check_beginning(training.actor_rollout_ref.model)
    model = check_start(training, out.path, trains=False)
    make_room_for_prompts(training, cfg, weights, files)
    check_context(training)
    check_prompt_lengths(names, "data", training)
    with out.locked():
        begin(cfg, out, identity(cfg, model, data.sha256) | decided(training), console)
        if out.summary.exists():
            say(console, f"{out.path} is complete; fresh=true starts it anew")
            return read_json(out.summary, "fresh=true starts anew")
        rows = rows_to_answer(files, cfg.n, cfg.temperature, cfg.greedy, cfg.seed)
        if answered := collect(out):
            say(console, f"continuing {out.path}: {len(answered)} of {len(rows)} responses are there")
        missing = [row for row in rows if sample_key(row) not in answered]
        if missing:
            pq.write_table(pa.Table.from_pylist(missing), out.path / PENDING)
            training.actor_rollout_ref.model.path = str(hugging_face(weights, out.path / "merged", out.log))
            training.data.train_batch_size = min(len(missing), 8)  # nothing is trained, but verl requires a batch
            batches = ceil(len(missing) / training.data.val_batch_size)
            start_verl(training, out, console, batches, val_before_train=True, val_only=True)
            answered = collect(out)
        responses = [answered[sample_key(row)] for row in rows if sample_key(row) in answered]
        if len(responses) < len(rows):
            lost = len(rows) - len(responses)
            raise UserError(
                f"verl left {lost} of {len(rows)} rows without a response; see {out.log}; {same_command()} asks "
                "for them again"
            )
        return finish(cfg, out, responses)


def finish(cfg: DictConfig, out: RunFolder, responses: list[Row]) -> Row:
    """Write samples/ in order, and summary.json."""
    for row in responses:
        name, index, _ = sample_key(row)
        row |= {"set": name, "prompt_id": f"{name}-{index}"}
    samples = [row for row in responses if row["extra_info"]["sample"]]
    greedy = [row for row in responses if not row["extra_info"]["sample"]]
    pairs = pairwise(read_lines(out.events))  # of verl's finished batches
    seconds = sum(b["time"] - a["time"] for a, b in pairs if (a["event"], b["event"]) == ("generating", "generated"))
    tokens = sum(row["response_tokens"] for row in responses)
    summary = {
        "model": cfg.model,
        "data": OmegaConf.to_container(cfg)["data"],  # type: ignore[index,call-overload]
        "seed": cfg.seed,
        "temperature": cfg.temperature,
        **summarize(samples),
        **measure(samples, greedy),
        "missing": what_is_missing(samples),
        "confidence": CONFIDENCE,
        "cost": {"responses": len(responses), "response tokens": tokens, "seconds of sampling": seconds},
    } | provenance()
    write_whole(out.samples_of("validation", 0), as_lines(samples))
    if greedy:
        write_whole(out.samples_of("greedy", 0), as_lines(greedy))
    write_json(out.summary, summary)
    for path in (out.samples / ANSWERED, out.path / PENDING):
        path.unlink(missing_ok=True)
    shutil.rmtree(out.path / "merged", ignore_errors=True)
    return summary
