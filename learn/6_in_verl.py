"""python learn/6_in_verl.py [key=value ...]: what script 5 does, in verl.

Nothing new is learned here: the same model, problems, reward and objective, in the trainer that also trains on eight
GPUs. What was one process becomes several. vLLM draws the responses, ranks share the update under FSDP, Ray starts and
joins them, and every setting is a key of one configuration. The table below says which line of script 5 became which
key; it is checked against the configuration before anything starts. `start=0` only prints it, and the command.

What to look at: the curve is script 5's within noise (docs/learn/6_in_verl.md has three seeds of both); the problems
come in another order.
"""

# %% What can be changed on the command line, and the command
import os
import shlex
import subprocess
import sys

import common
from omegaconf import OmegaConf

from data_prep.cli import UserError, compose, quoted
from verl_recipes.run.folder import RunFolder, read_json, read_metrics
from verl_recipes.settings import configuration  # noqa: F401  (resolvers of the configuration)

o = common.options("6_in_verl", steps=12, seed=0, start=1)
NAME = o.name.removesuffix("-start=0")
RUN = RunFolder(common.RUNS / f"{NAME}.verl")
OVERRIDES = [
    f"run_dir={quoted(os.path.relpath(RUN.path, common.ROOT))}",
    f"trainer.total_training_steps={o.steps}",
    f"seed={o.seed}",
    "recipe=tiny",
    "updates=4",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.kl_loss_coef=0.04",
    "actor_rollout_ref.actor.clip_ratio_c=1e6",  # a second clip of verl's, which script 5 does not have
]
COMMAND = ["-m", "verl_recipes.train", *OVERRIDES]

# %% A piece of script 5, the key of verl's that says the same, and the key's value
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
LINES = [
    ("steps=12,", "trainer.total_training_steps", o.steps),
    ("prompts=32,", "data.train_batch_size", 32),
    ("n=8,", f"{ROLLOUT}.n", 8),
    ("lr=0.15,", f"{ACTOR}.optim.lr", 0.15),
    ("seed=0,", "data.seed", o.seed),
    ('reward="countdown",', "reward.custom_reward_function.path", "pkg://reward_score.countdown"),
    ("epochs=1,", f"{ACTOR}.ppo_epochs", 1),
    ("updates=4,", f"{ACTOR}.ppo_mini_batch_size", 32 // 4),
    ("clip=0.2,", f"{ACTOR}.clip_ratio", 0.2),
    ("kl=0.04,", f"{ACTOR}.kl_loss_coef", 0.04),
    ("common.load(", "actor_rollout_ref.model.path", "assets/tiny_base"),
    ("copy.deepcopy(model)", f"{ACTOR}.use_kl_loss", True),
    ("torch.optim.SGD(", f"{ACTOR}.optim.optimizer", "SGD"),
    ("drawn_with = ", "algorithm.rollout_correction.bypass_mode", True),
    ("common.micro_batches(", f"{ACTOR}.use_dynamic_bsz", True),
    ("ratio.clamp(1 - o.clip, ", f"{ACTOR}.clip_ratio_low", 0.2),
    (", 1 + o.clip)", f"{ACTOR}.clip_ratio_high", 0.2),
    ("(torch.exp(d) - d - 1).clamp(max=10)", f"{ACTOR}.kl_loss_type", "low_var_kl"),
    (".sum() / tokens", f"{ACTOR}.loss_agg_mode", "token-mean"),
    ("clip_grad_norm_(model.parameters(), 1.0)", f"{ACTOR}.optim.clip_grad", 1.0),
    ("common.batch_of(train, ", "data.train_files", "data/tiny/train.parquet"),
    ("common.sample(", f"{ROLLOUT}.temperature", 1.0),
    ("common.sample(", "data.max_response_length", common.LONGEST),
    ("scores - scores.mean(1, ", "algorithm.adv_estimator", "grpo"),
    ("/ (deviation + 1e-6)", "algorithm.norm_adv_by_std_in_grpo", True),
    ("run.finish(", "data.val_files", "data/tiny/test.parquet"),
]
script = (common.ROOT / "learn" / "5_kl.py").read_text(encoding="utf-8").splitlines()
cfg = compose("train", OVERRIDES)
for piece, key, value in LINES:
    number = next((i for i, line in enumerate(script, 1) if piece in line), None)
    if number is None or OmegaConf.select(cfg, key) != value:
        raise UserError(f"learn/5_kl.py has {piece} and verl {key}={OmegaConf.select(cfg, key)}: they do not agree")
    print(f"5_kl.py:{number:<3} {piece:<40} {key} = {value}")
print(shlex.join(["python", *COMMAND]), flush=True)  # before what the command prints

# %% The run. The same command again continues it, or finds it complete
if o.start and (status := subprocess.run([sys.executable, *COMMAND], cwd=common.ROOT).returncode):
    sys.exit(status)  # the command said why

# %% Its curve, from the files of the run, beside those of the scripts
if o.start:
    run = common.Run(NAME)
    for step, figures in read_metrics(RUN).items():
        if "reward/acc" in figures:
            score, acc, tokens = (figures[key] for key in ("critic/score/mean", "reward/acc", "response_length/mean"))
            run.line(step=step, score=round(score, 3), acc=round(acc, 3), tokens=round(tokens, 1))
    trained = read_json(RUN.summary, "run this script again")["trained"]
    run.line(held_out=round(trained["mean@8"], 4), held_out_tokens=round(trained["response_tokens"], 1))
    run.draw()
