"""python benchmarks/recipes_train.py [--as-on-gpus] [name ...]: each recipe trains two real steps, tiny, on a CPU.

With 8 prompts a step and 64 tokens a response, this shows that every algorithm runs with finite losses, not that it
learns. Writes the table of benchmarks/recipes_train.md; rows that are not named stay. A row takes one to two minutes on
two cores.

--as-on-gpus takes what the CPU platform leaves out for speed: verl's own agent loop with eight workers, and packed
sequences (benchmarks/as_on_gpus.txt). Its table is benchmarks/recipes_train_as_on_gpus.md.
"""

import math
import subprocess
import sys
from pathlib import Path

from rich.progress import track

from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("tiny", "tinyzero_grpo", "mini_r1", "datawhale_r1", "datawhale_r1_article", "dapo", "dr_grpo", "rloo")
RECIPES += ("gspo", "cispo", "sapo", "gmpo", "gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo")
RECIPES += ("grpo_passk", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "minrl", "warm_rloo")
ROWS = {recipe: [f"recipe={recipe}"] for recipe in ("tinyzero_ppo", *RECIPES)} | {
    f"{recipe} {group}": [f"recipe={recipe}", group]
    for recipe, group in (
        ("mini_r1", "tuning=lora"),
        ("mini_r1", "topology=split"),
        ("tiny", "topology=colocated_async"),
        ("tiny", "topology=split_async"),
        *(("tiny", f"curriculum={order}") for order in ("easy_to_hard", "balanced", "adaptive")),
        ("tinyzero_ppo", "topology=split"),
    )
}
SHORT = ["prompts=8", "data.max_response_length=64", "eval_n=1", "trainer.total_training_steps=2"]
SHORT += ["trainer.save_freq=2", "trainer.test_freq=2", "fresh=true"]
ROWS["tinyzero_ppo topology=split"] += ["algorithm.rollout_correction.bypass_mode=true"]
COLUMNS = {
    "loss": "actor/pg_loss",
    "gradient": "actor/grad_norm",
    "KL loss": "actor/kl_loss",
    "KL in the reward": "actor/reward_kl_penalty",
    "value loss": "critic/vf_loss",
    "sampled anew": "training/filter_groups/evicted_samples",
    "agreement": "agreement",
    "seconds a step": "timing_s/step",
}


def row(name: str, overrides: list[str], data: Path, run_dir: Path) -> list[str]:
    """Train, and return the cells of the second step: its metrics, or a dash for what the recipe does not have."""
    command = [sys.executable, "-m", "verl_recipes.train", *overrides, "model=tiny", "hardware=cpu", *SHORT]
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    done = subprocess.run([*command, *files, f"run_dir={run_dir}"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [name, done.stderr.strip().splitlines()[-1], *[""] * (len(COLUMNS) - 1)]
    lines = [line["data"] for line in read_lines(run_dir / "metrics.jsonl")]
    metrics = [line for line in lines if "training/global_step" in line][-1]
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    metrics |= {"agreement": next(metrics[key] for key in AGREEMENT if key in metrics)}
    return [name, *(f"{metrics[key]:.4g}" if key in metrics else "-" for key in COLUMNS.values())]


def main(names: list[str], as_on_gpus: bool) -> None:
    kind = "recipes_train_as_on_gpus" if as_on_gpus else "recipes_train"
    more = (ROOT / "benchmarks" / "as_on_gpus.txt").read_text(encoding="utf-8").split() if as_on_gpus else []
    data = ROOT / "data" / "recipes_train"
    subprocess.run(
        [sys.executable, "-m", "data_prep", f"out={data}", "train_size=512", "test_size=8"], cwd=ROOT, check=True
    )
    path = ROOT / "benchmarks" / f"{kind}.md"
    cells = [line[2:-2].split(" | ") for line in path.read_text().splitlines()[2:]] if path.exists() else []
    table = {each[0]: each for each in cells}
    for name in track(names or list(ROWS), "recipes"):
        run_dir = ROOT / "runs" / kind / name.replace(" ", "-").replace("=", "-")
        table[name] = row(name, ROWS[name] + more, data, run_dir)
        whole = [["recipe", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *(table[each] for each in ROWS if each in table)]
        path.write_text("".join(f"| {' | '.join(each)} |\n" for each in whole))
    print(path.read_text())


if __name__ == "__main__":
    main([each for each in sys.argv[1:] if each != "--as-on-gpus"], "--as-on-gpus" in sys.argv)
