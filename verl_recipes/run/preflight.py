"""Checks before anything heavy starts: what would fail later is one line now."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from data_prep.cli import UserError, as_list
from data_prep.folder import file_sha256
from verl_recipes.planning.space import Need, export_needs, needs
from verl_recipes.run.checkpoints import checkpoint_error, checkpoint_steps, how_to_continue, ranks_of
from verl_recipes.run.cluster import in_job
from verl_recipes.run.folder import RunFolder, mark_of, read_json
from verl_recipes.run.model import (
    check_beginning,
    check_context,
    check_kind,
    check_readable,
    check_same_model,
    check_weights,
    tokenizer_folder,
)
from verl_recipes.run.reward import check_reward
from verl_recipes.run.trackers import check_trackers
from verl_recipes.settings.configuration import check_choice, gpus_of

COLUMNS = {"data_source", "prompt", "reward_model"}


class DataFiles(NamedTuple):
    """The parquet files of a configuration key: their rows in all, and the SHA-256 of each."""

    rows: int
    sha256: dict[str, str]


class Inputs(NamedTuple):
    """What a run reads: its data, and the model by `check_model`."""

    train: DataFiles
    val: DataFiles
    model: dict[str, str]


def check_parquet(
    files: str | Sequence[str], key: str, made_by: str = "python -m data_prep", needed: set[str] = COLUMNS
) -> DataFiles:
    """The parquet files of a configuration key, after checking that verl can read them. Each is read once.

    Args:
        files: one or several.
        key: names them in an error.
        made_by: the command that writes them.
        needed: columns that each must have.
    """
    import pyarrow as pa  # takes a fifth of a second, which a refused key should not cost
    import pyarrow.parquet as pq

    rows, sha256, strange = 0, dict[str, str](), ""
    for name in as_list(files):
        path = Path(name)
        if path.is_dir():
            raise UserError(f"{key}: {path} is a folder; name its parquet files")
        if not path.is_file():
            command = command_that_makes(name, made_by)
            make = f"; make it with `{command}`" if command else f", and `{made_by}` makes other files"
            raise UserError(f"{key}: {path} does not exist{make}")
        check_readable(path)
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{key}: {path} is not a whole parquet file ({str(error).splitlines()[0]})") from None
        said = manifest_beside(path).get("files", {}).get(path.name, {}).get("sha256")
        sha256[str(name)] = file_sha256(path)
        if said and said != sha256[str(name)]:
            raise UserError(
                f"{key}: {path} is not the file that its manifest.json records; make it again with `{made_by}`, or "
                "delete the manifest if you changed the data yourself"
            )
        if missing := needed - {*schema.names}:
            raise UserError(
                f"{key}: {path} has no column {', '.join(sorted(missing))}; it has {', '.join(sorted(schema.names))}"
            )
        if "prompt" in needed and not pa.types.is_nested(kind := schema.field("prompt").type):
            strange = f"{key}: prompt in {path} is {kind}; a list of messages with role and content is expected"
        rows += metadata.num_rows
    if rows == 0:
        raise UserError(f"{key}: no rows in {files}")
    if strange:
        raise UserError(strange)
    return DataFiles(rows, sha256)


def command_that_makes(file: str, made_by: str) -> str:
    """The command `made_by` if it makes this file, else "".

    >>> command_that_makes("data/x/train.parquet", "python -m data_prep out=data/x")
    'python -m data_prep out=data/x'
    >>> command_that_makes("my.parquet", "python -m data_prep")
    ''
    """
    out = re.search(r"\bout=(\S+)", made_by)
    made = Path(out[1] if out else "data/tiny")  # configs/prepare.yaml
    return made_by if Path(file).parent == made and Path(file).name in ("train.parquet", "test.parquet") else ""


def manifest_beside(path: Path) -> dict[str, Any]:
    """The manifest of data_prep's in the folder of a data file, {} if there is none (data_prep/manifest.py)."""
    from data_prep.manifest import read_manifest  # it loads pyarrow

    if not (manifest := path.parent / "manifest.json").exists():
        return {}
    read_json(manifest, "make the data again")  # a damaged one is refused
    return read_manifest(path.parent) or {}


def check_prompt(files: str | Sequence[str], cfg: DictConfig) -> None:
    """Raise UserError if the data was made with another chat template, or other options of it, than the run's."""
    template, options = cfg.actor_rollout_ref.model.custom_chat_template, cfg.data.apply_chat_template_kwargs
    for name in as_list(files):
        made = manifest_beside(Path(name)).get("configuration", {}).get("prompt")
        if not made:
            continue
        prompt, advice = f"prompt={made['name']}", "or make the data again with this command's prompt"
        if made.get("chat_template") != template:
            raise UserError(f"{name} was made with {prompt}, which has another chat template; add {prompt}, {advice}")
        if (theirs := made.get("template_options", {})) != options:
            has = f"which has template_options={json.dumps(theirs)}"
            raise UserError(f"{name} was made with {prompt}, {has}; add {prompt}, {advice}")


def other_ranks(cfg: DictConfig, checkpoint: Path) -> int:
    """How many ranks saved a checkpoint, if the command has another number of them; else 0."""
    before = ranks_of(checkpoint / "actor")
    return before if before != gpus_of(cfg)[0] else 0


def check_resume(cfg: DictConfig, run: RunFolder, step: int) -> None:
    """Raise UserError if the run cannot continue after this step: no steps are left, or its checkpoint is damaged."""
    if step > cfg.trainer.total_training_steps:
        raise UserError(f"{run.path} is already at step {step}: set trainer.total_training_steps to {step} or more")
    if damaged := checkpoint_error(run.checkpoints / f"global_step_{step}"):
        raise UserError(f"{damaged}; {how_to_continue(run.checkpoints, below=step)}")
    before = other_ranks(cfg, run.checkpoints / f"global_step_{step}")
    if before and cfg.actor_rollout_ref.actor.fsdp_config.fsdp_size != -1:
        raise UserError(
            f"{run.path} was saved by {before} ranks and would go on with {gpus_of(cfg)[0]}, for which "
            "actor_rollout_ref.actor.fsdp_config.fsdp_size=-1 is needed; go on with as many"
        )


def check_place(run: RunFolder) -> None:
    """Raise UserError if a run would take over checkpoints of another, or a new run those that lie elsewhere."""
    place = run.checkpoints.absolute()
    for folder in [place, *place.parents] if run.checkpoints_elsewhere else ():
        if mark_of(folder) and folder.resolve() != run.path.resolve():
            raise UserError(
                f"trainer.default_local_dir={run.checkpoints} is in another run, {folder}: name another folder"
            )
    if not mark_of(run.path) and checkpoint_steps(run.checkpoints):
        raise UserError(
            f"trainer.default_local_dir={run.checkpoints} holds checkpoints, and {run.path} is a new run: name an "
            "empty folder, or remove them yourself"
        )


def check_settings(cfg: DictConfig) -> None:
    """Raise UserError for choices that do not go together, and for keys of verl's that this project sets itself."""
    check_choice(cfg)
    trainer = cfg.trainer
    if list(trainer.logger) != list(cfg.trackers):
        chosen = [name for name in trainer.logger if name != "file"]
        raise UserError(
            f"trainer.logger={list(trainer.logger)}: choose trackers by tracker=[{','.join(chosen)}], which sets "
            "what they need; the file logger is always on"
        )
    for key in ("actor_rollout_ref.actor", "critic"):
        if (strategy := OmegaConf.select(cfg, f"{key}.strategy")) != "fsdp2":
            raise UserError(f"{key}.strategy={strategy}: this project has engines for fsdp2 alone: leave it out")
        saved = OmegaConf.select(cfg, f"{key}.checkpoint")
        kept = set(saved.save_contents) & set(saved.load_contents)
        if missing := {"model", "optimizer", "extra"} - kept:
            raise UserError(
                f"{key}.checkpoint: save_contents and load_contents lack {', '.join(sorted(missing))}, which a "
                "resume needs: name model, optimizer and extra in both; save_contents may also have hf_model"
            )
        if saved.get("async_save"):
            raise UserError(
                f"{key}.checkpoint.async_save=true: verl 0.9.1 then records no checkpoint of FSDP: leave it out"
            )
    if (folder := trainer.v1.sampler.sampler_kwargs.samples_dir) != f"{cfg.run_dir}/samples":
        raise UserError(
            f"trainer.v1.sampler.sampler_kwargs.samples_dir={folder}: a run's samples are in its own folder; "
            "leave it out"
        )
    tests = cfg.actor_rollout_ref.rollout.val_kwargs
    if tests.n != cfg.eval_n:
        raise UserError(f"actor_rollout_ref.rollout.val_kwargs.n={tests.n}: write eval_n={tests.n}, which sets it")
    if not tests.do_sample:
        raise UserError(
            "actor_rollout_ref.rollout.val_kwargs.do_sample=false: verl 0.9.1 does not read it; for greedy tests set "
            "actor_rollout_ref.rollout.val_kwargs.temperature=0 eval_n=1"
        )
    if not trainer.val_before_train:
        raise UserError(
            "trainer.val_before_train=false: a run always measures the model first; eval_n=1 makes it short"
        )
    if not trainer.get("use_v1", True):
        raise UserError("trainer.use_v1=false: verl's former trainer writes no samples here; leave it out")
    if trainer.get("val_only"):
        raise UserError(
            "trainer.val_only=true: a run trains; `python -m verl_recipes.evaluate model=PATH` only measures"
        )
    if cfg.data.val_max_samples > 0 and (tests.n > 1 or cfg.data.val_batch_size):
        raise UserError(
            f"data.val_max_samples={cfg.data.val_max_samples}: verl would take so many responses, and not so many "
            "problems: add eval_n=1 and leave data.val_batch_size out, or make data with a smaller test_size"
        )
    if path := cfg.actor_rollout_ref.model.get("tokenizer_path"):
        raise UserError(
            f"actor_rollout_ref.model.tokenizer_path={path}: checks, samples and exports read the model's folder; copy "
            "the tokenizer's files there, and leave this out"
        )
    if trainer.resume_mode != "auto":
        raise UserError(f"trainer.resume_mode={trainer.resume_mode}: a run resumes by itself; fresh=true starts anew")


def check_training_data(cfg: DictConfig) -> DataFiles:
    """The training data, after checking that it lasts for the steps and holds what a curriculum orders it by."""
    found, trainer, data = check_data(cfg, "data.train_files", cfg.data.train_files), cfg.trainer, cfg.data
    most = data.get("train_max_samples", -1)
    rows = min(found.rows, most) if most and most > 0 else found.rows
    if rows < data.train_batch_size:
        limit = f" of data.train_max_samples={most}" if rows < found.rows else ""
        raise UserError(
            f"data.train_files: {rows} rows{limit} are less than a batch of "
            f"data.train_batch_size={data.train_batch_size}: take a smaller prompts=, or more rows"
        )
    if rows // data.train_batch_size * trainer.total_epochs < trainer.total_training_steps:
        raise UserError(
            f"trainer.total_epochs={trainer.total_epochs} of {rows} rows end before "
            f"trainer.total_training_steps={trainer.total_training_steps}: raise total_epochs, or leave it out"
        )
    check_curriculum(cfg)
    return found


def check_curriculum(cfg: DictConfig) -> None:
    """Raise UserError if the run orders its problems by a difficulty that the data does not hold."""
    if not (curriculum := cfg.data.get("curriculum")):
        return
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from verl_recipes.measure.difficulty import edges_of  # it loads numpy

    if cfg.data.dataloader_num_workers:
        raise UserError(
            f"data.dataloader_num_workers={cfg.data.dataloader_num_workers}: each would have a curriculum of its own; "
            "curriculum= needs 0"
        )
    filters = cfg.algorithm.get("filter_groups")
    if filters and filters.enable:
        raise UserError(
            f"curriculum={curriculum.order} needs every group's result, and dynamic sampling "
            "(algorithm.filter_groups.enable) drops some: leave the curriculum out, or choose another recipe"
        )
    difficulty: list[float] = []
    for name in as_list(cfg.data.train_files):
        file = pq.ParquetFile(name)
        rows, table = file.metadata.num_rows, file.read(columns=["extra_info.difficulty"])  # no column if there is none
        found = pc.struct_field(table["extra_info"], "difficulty").to_pylist() if table.column_names else []
        known = [each for each in found if isinstance(each, int | float)]
        if unknown := rows - len(known):
            raise UserError(
                f"curriculum={curriculum.order}: {unknown} of {rows} problems in {name} have no difficulty; make "
                "the data with annotate=true and unsolvable=drop, or leave the curriculum out"
            )
        difficulty += known
    if not edges_of(difficulty):
        raise UserError(
            f"curriculum={curriculum.order}: the {len(difficulty)} problems of data.train_files are about equally "
            "hard, so there is nothing to order; leave the curriculum out"
        )


def check_space(cfg: DictConfig, run_dir: Path, trains: bool = True) -> None:
    """Raise UserError if the machine lacks memory or disk for the run, unless force=true.

    Ray runs a job's command on the cluster's head, so its memory is not asked for if the run is on GPUs.
    """
    memory, *disks = needs(cfg, run_dir, trains)
    elsewhere = in_job() and cfg.trainer.device != "cpu"
    if (short := lacking(disks if elsewhere else [memory, *disks])) and not cfg.force:
        raise UserError(f"{short}; force=true starts it all the same")


def lacking(needed: Sequence[Need]) -> str:
    """What is needed and not free, as clauses; "" for nothing."""
    return "; ".join(str(each) for each in needed if each.free < each.need)


def check_data(cfg: DictConfig, key: str, files: Any) -> DataFiles:
    """Raise UserError if data files cannot be read, or their prompts do not fit the run; returns rows and hashes."""
    found = check_parquet(files, key, cfg.data.made_by)
    if others := [name for name in as_list(files) if not name.endswith(".parquet")]:
        raise UserError(
            f"{key}: {others[0]}: verl takes a file for parquet only if its name ends in .parquet; rename it"
        )
    check_prompt(files, cfg)
    check_prompt_lengths(files, key, cfg)
    return found


def check_prompt_lengths(files: Any, key: str, cfg: DictConfig) -> None:
    """Raise UserError if a prompt is too long where verl's own agent loop runs, which cuts off its beginning.

    On the CPU platform BatchRollout refuses such a prompt itself.
    The 16 with most characters are counted in tokens, if the model's tokenizer is on this machine.
    """
    model, most = cfg.actor_rollout_ref.model, cfg.data.max_prompt_length
    folder = tokenizer_folder(model.path)
    in_batches = cfg.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
    if (cfg.architecture and in_batches) or not (folder and folder.is_dir()):
        return
    if cfg.data.get("filter_overlong_prompts"):  # verl then leaves them out
        return
    import numpy as np  # these take a while, as does the start of a run on GPUs
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from data_prep.render import load_tokenizer, render

    prompt = {"name": "null", "chat_template": model.custom_chat_template}
    tokenizer = load_tokenizer(str(folder), prompt, model.trust_remote_code)
    for name in as_list(files):
        prompts = pq.read_table(name, columns=["prompt"])["prompt"].combine_chunks()
        characters = pc.utf8_length(pc.struct_field(prompts.flatten(), "content"))
        lengths = np.bincount(pc.list_parent_indices(prompts), weights=characters)
        longest = prompts.take(np.argsort(lengths)[-16:]).to_pylist()
        options = cfg.data.apply_chat_template_kwargs
        tokens = max((len(render(tokenizer, each, **options)[1]) for each in longest), default=0)
        if tokens > most:
            raise UserError(
                f"{key}: a prompt of {name} has {tokens} tokens of this model's, and verl would cut off its beginning "
                f"at data.max_prompt_length={most}: raise that to {tokens}"
            )


def check_start(cfg: DictConfig, folder: Path, trains: bool = True) -> dict[str, str]:
    """Raise UserError if the machine lacks room or the model is unusable; returns its identity (`check_model`)."""
    model = cfg.actor_rollout_ref.model
    if cfg.fresh or not mark_of(folder):  # what was begun before these checks goes on
        check_kind(model)
        if trains:
            check_beginning(model)
    identity = check_weights(model)  # first, as the room is counted from the model's files
    check_space(cfg, folder, trains)
    return identity


def check_export(cfg: DictConfig, out: Path, dtype: str) -> None:
    """Raise UserError if the model is unusable or the disk has no room for `out`; `cfg` names the weights as model."""
    check_weights(cfg.actor_rollout_ref.model)
    if short := lacking(export_needs(cfg, out, dtype)):
        raise UserError(f"{short}; name a folder on a larger disk with out=")


def preflight(cfg: DictConfig, run: RunFolder) -> Inputs:
    """Raise UserError for what would fail later in a run; returns what the run reads."""
    check_settings(cfg)
    check_place(run)
    check_trackers(cfg.trackers)
    check_reward(cfg)
    train, val = check_training_data(cfg), check_data(cfg, "data.val_files", cfg.data.val_files)
    check_same_model(cfg)
    model = check_start(cfg, run.path)
    check_context(cfg)
    return Inputs(train, val, model)
