"""python benchmarks/arena.py [run|page] [algorithm ...] [seeds=0,1,2]: the algorithms against each other, tiny.

run   Trains each algorithm (default: all) on the tiny base at an equal budget: the same problems, 32 prompts x 8
      responses a step, 30 steps, AdamW. First each learning rate of RATES with the first seed; then the one with the
      most right answers in training, which is a choice without the test problems, with the other seeds. One run after
      another, each three to eight minutes on two cores; each leaves a file in benchmarks/results/arena, and what has a
      file is not run again. The control (GRPO with a coin for a reward) and the levers (GRPO with one thing changed)
      run at GRPO's learning rate.
page  Writes docs/arena.md, docs/zh/arena.md and assets/arena.svg from those files. A test compares them.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from results import environment, response_tokens

from reward_score.figures import pass_at_k
from verl_recipes.measure.comparison import sign_flip_p
from verl_recipes.measure.intervals import figure
from verl_recipes.measure.problems import by_problem, finite, values
from verl_recipes.run.folder import RunFolder, read_lines, write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "arena"
RUNS = ROOT / "runs" / "arena"
REFERENCE, CONTROL = "grpo", "random reward"
RATES = (1e-4, 3e-4, 1e-3)
STEPS, N = 30, 8
# Name: what differs from the others. GRPO and PPO are TinyZero's.
ALGORITHMS = {
    REFERENCE: ["recipe=tinyzero_grpo"],
    "ppo": ["recipe=tinyzero_ppo", "critic.optim.lr='${multiply:10,${learning_rate}}'"],
    **{
        name: [f"recipe={name}"]
        for name in (
            *("dapo", "dr_grpo", "rloo", "gspo", "cispo", "sapo", "gmpo", "gpg", "reinforce_plus_plus"),
            *("reinforce_plus_plus_baseline", "opo", "grpo_passk", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov"),
        )
    },
    CONTROL: ["recipe=tinyzero_grpo"],
}
STALE = ["topology=colocated_async", "staleness=3"]
LEVERS = {
    "closeness": [],  # its reward is below
    **{order: [f"curriculum={order}"] for order in ("easy_to_hard", "balanced", "adaptive")},
    "stale": STALE,
    "stale_corrected": [*STALE, "correction=token_tis"],
}
REWARDS = {CONTROL: "random", "closeness": "closeness"}
NAMES = [*ALGORITHMS, *LEVERS]
TEMPLATES = {"arena.md.jinja": "docs/arena.md", "arena.zh.md.jinja": "docs/zh/arena.md"}


def name_of(algorithm: str, rate: float, seed: int) -> str:
    return f"{algorithm.replace(' ', '-')}-lr{rate:g}-seed{seed}"


def overrides(algorithm: str, rate: float, seed: int) -> list[str]:
    """The arguments of the training command."""
    return [
        *(["recipe=tinyzero_grpo", *LEVERS[algorithm]] if algorithm in LEVERS else ALGORITHMS[algorithm]),
        *("model=tiny", "hardware=cpu", "data=tiny", f"reward={REWARDS.get(algorithm, 'countdown')}"),
        *("prompts=32", f"actor_rollout_ref.rollout.n={N}", "data.max_response_length=256"),
        *(f"trainer.total_training_steps={STEPS}", f"eval_n={N}"),
        *(f"trainer.save_freq={STEPS}", f"trainer.test_freq={STEPS}", "actor_rollout_ref.actor.calculate_entropy=true"),
        *(f"learning_rate={rate:g}", f"seed={seed}"),
    ]


def right_counts(rows: Iterable[dict[str, Any]]) -> list[int]:
    """How many of each problem's samples are right, in the order of the problems' keys."""
    return [
        int(sum(values(group, "acc"))) for _, group in sorted(by_problem(rows).items(), key=lambda item: str(item[0]))
    ]


def kl_to_base(run: Path) -> float:
    """Mean KL divergence of the trained model from the base, per token, over its answers to every N-th test problem."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, base = (
        AutoModelForCausalLM.from_pretrained(path) for path in (run / "model", ROOT / "assets" / "tiny_base")
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_base")
    total = tokens = 0.0
    for row in read_lines(run / "samples" / "validation" / f"{STEPS}.jsonl")[::N]:
        prompt, response = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "response")
        )
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (trained, base))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(response)
    return total / tokens


def measured(run: Path) -> dict[str, Any]:
    """What is kept of a run that ended."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [line["data"] for line in read_lines(run / "metrics.jsonl")]
    steps = [line for line in lines if "reward/acc" in line]
    rows = [read_lines(run / "samples" / "validation" / f"{step}.jsonl") for step in (0, STEPS)]
    return {
        "git_commit": summary["git_commit"],
        "training accuracy": [round(step["reward/acc"], 4) for step in steps],
        "entropy": [round(value, 4) for step in steps if (value := finite(step.get("actor/entropy"))) is not None],
        "right of 8": {"before": right_counts(rows[0]), "after": right_counts(rows[1])},
        "response tokens": summary["trained"]["response_tokens"],
        "tokens": response_tokens(RunFolder(run)),
        "seconds": round(summary["goodput"].get("steps") or sum(step["timing_s/step"] for step in steps), 1),
        "KL to the base": round(kl_to_base(run), 5),
    }


def train(algorithm: str, rate: float, seed: int) -> dict[str, Any]:
    """The file of a run, made first if it is missing. A run that ended early (an alarm) counts as collapsed."""
    name = name_of(algorithm, rate, seed)
    target, run = RESULTS / f"{name}.json", RUNS / name
    if not target.exists():
        print(f"\n{name}", flush=True)
        command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={run.relative_to(ROOT)}"]
        done = subprocess.run([*command, *overrides(algorithm, rate, seed)], cwd=ROOT, stdout=subprocess.DEVNULL)
        log = run / "log.txt"
        said = log.read_text("utf-8") if log.exists() else ""
        if done.returncode and not any(alarm in said for alarm in ("DegenerateOutputError", "actor disagree")):
            sys.exit(f"{name} ended with status {done.returncode}: see the message above; the same command goes on")
        result = {"collapsed": "an alarm ended it"} if done.returncode else measured(run)
        typed = " ".join(["python -m verl_recipes.train", *overrides(algorithm, rate, seed)])
        result = {"command": typed, "algorithm": algorithm, "learning rate": rate, "seed": seed, **result}
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps(result) + "\n")
    return json.loads(target.read_text(encoding="utf-8"))


def training_accuracy(result: dict[str, Any]) -> float:
    """The area under the curve of training, by which a learning rate is chosen; 0 for a run that collapsed."""
    return fmean(result["training accuracy"]) if "training accuracy" in result else 0.0


def at_its_rate(name: str) -> bool:
    """Whether it runs at GRPO's learning rate, without a sweep of its own."""
    return name == CONTROL or name in LEVERS


def chosen_rate(algorithm: str, seed: int) -> float:
    of = REFERENCE if at_its_rate(algorithm) else algorithm
    return max(RATES, key=lambda rate: training_accuracy(train(of, rate, seed)))


def run(algorithms: list[str], seeds: list[int]) -> None:
    for algorithm in algorithms:
        rate = chosen_rate(algorithm, seeds[0])
        for seed in seeds:
            train(algorithm, rate, seed)


def load() -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]


def by_algorithm(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each algorithm at the learning rate that most of its seeds have, in the order of NAMES.

    An algorithm whose rates are not all measured is left out: it would be compared at a rate that nobody chose.
    """
    found: dict[str, dict[float, list[dict[str, Any]]]] = {name: {} for name in NAMES}
    for each in results:
        found[each["algorithm"]].setdefault(each["learning rate"], []).append(each)
    return {
        name: max(rates.values(), key=lambda runs: (len(runs), training_accuracy(runs[0])))
        for name, rates in found.items()
        if len(rates) == len(RATES) or (rates and at_its_rate(name))
    }


def of_problems(runs: list[dict[str, Any]], when: str) -> np.ndarray[Any, Any]:
    """The share of right answers to each problem, shape (problems,), over the samples of all seeds."""
    return np.mean([run["right of 8"][when] for run in runs if "right of 8" in run], axis=0) / N


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values of several comparisons, corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979)."""
    corrected, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(ps) - rank)))
        corrected[name] = largest
    return corrected


def row(algorithm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; `collapsed` alone if no seed came to its end."""
    whole = [each for each in runs if "right of 8" in each]
    line = {
        "algorithm": algorithm,
        "rate": runs[0]["learning rate"],
        "seeds": len(runs),
        "collapsed": len(runs) - len(whole),
    }
    if not whole:
        return line
    after = of_problems(whole, "after")
    means = [float(np.mean(each["right of 8"]["after"])) / N for each in whole]
    passes = [fmean(pass_at_k(N, count, N) for count in each["right of 8"]["after"]) for each in whole]
    half = [next((i + 1 for i, acc in enumerate(each["training accuracy"]) if acc >= 0.5), None) for each in whole]
    return line | {
        "problems": figure(after),
        "over seeds": figure(means, share=False),
        "pass": fmean(passes),
        "area": fmean(map(training_accuracy, whole)),
        "half": half,
        "entropy": fmean([each["entropy"][-1] for each in whole if each["entropy"]] or [math.nan]),
        "kl": fmean(each["KL to the base"] for each in whole),
        "response tokens": fmean(each["response tokens"] for each in whole),
        "tokens": fmean(each["tokens"] for each in whole),
        "seconds": fmean(each["seconds"] for each in whole),
    }


def table(results: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    """The lines of these and of GRPO, the best first, each with its difference from GRPO and Holm's p."""
    chosen = {REFERENCE, *names}
    groups = {name: runs for name, runs in by_algorithm(results).items() if name in chosen}
    rows = {name: row(name, runs) for name, runs in groups.items()}
    whole = {name: of_problems(groups[name], "after") for name, line in rows.items() if "problems" in line}
    others = [name for name in whole if name != REFERENCE and REFERENCE in whole]
    differences = {name: whole[name] - whole[REFERENCE] for name in others}
    ps = holm({name: sign_flip_p(difference) for name, difference in differences.items()})
    for name in others:
        rows[name] |= {"difference": figure(differences[name], share=False), "p": ps[name]}
    return sorted(rows.values(), key=lambda line: -line.get("problems", [0])[0])


def picture(results: list[dict[str, Any]]) -> None:
    """Training accuracy by step, mean over seeds, one small chart an algorithm with GRPO in grey behind it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "arena"
    from matplotlib import pyplot as plt

    curves = {
        name: np.mean([each["training accuracy"] for each in runs if "training accuracy" in each], axis=0)
        for name, runs in by_algorithm(results).items()
        if any("training accuracy" in each for each in runs)
    }
    columns = 5
    figure_, axes = plt.subplots(
        -(-len(curves) // columns),
        columns,
        figsize=(11, 2.1 * -(-len(curves) // columns)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        steps = range(1, len(curve) + 1)
        if REFERENCE in curves:
            axis.plot(range(1, len(curves[REFERENCE]) + 1), curves[REFERENCE], color="0.75", linewidth=1)
        axis.plot(steps, curve, color="C0", linewidth=1.5)
        axis.set_title(name, fontsize=8)
        axis.set_ylim(0, 1)
        axis.tick_params(labelsize=7)
    figure_.supxlabel("step", fontsize=8)
    figure_.supylabel("share of right answers in training", fontsize=8)
    figure_.tight_layout()
    figure_.savefig(ROOT / "assets" / "arena.svg", metadata={"Date": None})


def page(template: str, results: list[dict[str, Any]]) -> str:
    """One of the pages."""
    made = environment().get_template(f"arena/{template}")
    base = [each for each in results if "right of 8" in each]
    tables = {"algorithms": table(results, ALGORITHMS), "levers": table(results, LEVERS)}
    sweep = {
        name: {
            each["learning rate"]: training_accuracy(each)
            for each in results
            if (each["algorithm"], each["seed"]) == (name, 0)
        }
        for name in ALGORITHMS
    }
    differ = [row for row in tables["algorithms"] if row.get("p", 1) < 0.05 and row["algorithm"] != CONTROL]
    return made.render(
        tables=tables,
        better=[row["algorithm"] for row in differ if row["difference"][0] > 0],
        worse=[row["algorithm"] for row in differ if row["difference"][0] < 0],
        rates=RATES,
        steps=STEPS,
        n=N,
        runs=len(results),
        missing=[name for name in NAMES if len(by_algorithm(results).get(name, [])) < 3],
        total=len(NAMES),
        base=figure(of_problems(base[:1], "before")) if base else None,
        sweep=sweep,
        edge=[
            name
            for name, areas in sweep.items()
            if len(areas) == len(RATES) and max(areas, key=lambda rate: areas[rate]) in (RATES[0], RATES[-1])
        ],
    )


def main(arguments: list[str]) -> None:
    options = dict(each.split("=", 1) for each in arguments if "=" in each)
    if options.keys() - {"seeds"}:
        sys.exit(f"error: {', '.join(options)}: seeds= is the only option")
    names = [each for each in arguments if "=" not in each and each not in ("run", "page")]
    if unknown := [name for name in names if name not in NAMES]:
        sys.exit(f"there is no algorithm {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if "page" not in arguments:
        run(names or NAMES, [int(each) for each in options.get("seeds", "0,1,2").split(",")])
    results = load()
    picture(results)
    for template, path in TEMPLATES.items():
        (ROOT / path).write_text(page(template, results), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
