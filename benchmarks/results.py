"""python benchmarks/results.py measure|page: makes the results page from the files in benchmarks/results.

measure [runs=FOLDER]  evaluates the tiny base, the runs of the tiny recipe in FOLDER (default: runs; made by
                       benchmarks/gain.py) and the more-SFT control, on the test problems and on five sets out of
                       distribution. It writes benchmarks/results/<name>.json. A file that exists is not measured
                       again; delete it and runs/results/<name> for that. A model takes about two minutes on two cores.
page                   writes docs/results.md and docs/zh/results.md from those files. A test compares them.

The more-SFT control continues the base's own supervised training for about twice as many seconds as GRPO trains.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from reward_score.figures import interval
from verl_recipes.measure.behaviours import behaviours
from verl_recipes.measure.comparison import compare
from verl_recipes.measure.intervals import figure
from verl_recipes.reporting.metrics import seconds_of
from verl_recipes.run.folder import RunFolder, last_samples, read_json, read_lines, write_json, write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASE, SFT, SEEDS = "base", "more-sft", ("tiny-seed0", "tiny-seed1", "tiny-seed2")
RANDOM = "random-reward-seed0"
MODELS = (BASE, *SEEDS, RANDOM, SFT)
DATA = ["out=data/tiny-ood", "ood=standard", "ood.size=64"]
SFT_STEPS = 3600
SFT_STAGE = ["~stages.search", f"stages.give_up.steps={SFT_STEPS}"]
SFT_RUN = ["init=assets/tiny_base", "out=runs/more-sft", "seed=1", *SFT_STAGE]
N = 8
GPU_RUNS = [  # recipe, model, hardware
    ("tinyzero_ppo", "qwen2.5_3b", "a800_x4"),
    ("tinyzero_grpo", "qwen2.5_1.5b", "rtx4090_x1"),
    ("mini_r1", "qwen2.5_3b_instruct", "h100_x4"),
    ("datawhale_r1", "qwen2.5_3b_instruct", "a800_x3"),
]
RUNGS = {  # of the middle rung: the test that has its mean@8, and the place there (benchmarks/middle.py)
    "base": ("base, cold", "first"),
    "cold": ("base, cold", "second"),
    "warm start": ("warm start, both", "first"),
    "both": ("warm start, both", "second"),
}
PAGES = {"results.md.jinja": "docs/results.md", "results.zh.md.jinja": "docs/zh/results.md"}


def command(module: str, arguments: list[str]) -> str:
    """The command line that a person types."""
    quoted = [f"'{each}'" if set(each) & set("~[]") else each for each in arguments]
    return " ".join(["python -m", module, *quoted])


def evaluation(name: str, runs: str) -> list[str]:
    """Arguments of the evaluation of one model."""
    model = {BASE: "assets/tiny_base", SFT: "runs/more-sft"}.get(name, f"{runs}/{name}")
    return [f"model={model}", "data=data/tiny-ood", f"n={N}", f"out=runs/results/{name}"]


def run(module: str, arguments: list[str]) -> float:
    """Run one of the project's commands; returns its seconds."""
    started = time.time()
    print(f"\n{command(module, arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)
    return time.time() - started


def response_tokens(run: RunFolder) -> int:
    """The tokens of all responses that a run trained on."""
    return sum(row["response_tokens"] for file in run.sample_files("train").values() for row in read_lines(file))


def training_cost(folder: Path) -> dict[str, Any]:
    """Steps, seconds by stage and generated tokens of a run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kept = {name: summary[name] for name in ("git_commit", "steps", "seconds")}
    trained = summary["goodput"].get("steps")  # of all starts; none if the clock was set back
    kept["seconds"] |= {"total": seconds_of(summary)} | ({"train": trained} if trained else {})
    return kept | {"response tokens": response_tokens(RunFolder(folder))}


def measure(runs: str) -> None:
    """Write the file of each model that has none, unless its run is not finished."""
    run("data_prep", DATA)
    out = ROOT / "runs" / "results"
    for name in MODELS:
        target, folder, more = RESULTS / f"{name}.json", ROOT / runs / name, dict[str, Any]()
        if target.exists():
            continue
        if name in (*SEEDS, RANDOM):
            if not (folder / "summary.json").exists():
                print(f"{folder} is no finished run: left out")
                continue
            more["training"] = training_cost(folder)
        if name == SFT:
            took = out / f"{SFT}-seconds.json"  # this command may be ended before the control is measured
            if not (ROOT / "runs" / SFT).exists():
                write_json(took, run("verl_recipes.tiny_base", SFT_RUN))
            seconds = read_json(took, f"delete runs/{SFT}, and the same command makes it again")
            more["training"] = {"steps": SFT_STEPS, "seconds": {"train": seconds, "total": seconds}}
        for each in dict.fromkeys((BASE, name)):  # a complete evaluation is read, not repeated
            run("verl_recipes.evaluate", evaluation(each, runs))
        if name != BASE:
            test = [[row for row in last_samples(out / each) if row["set"] == "test"] for each in (BASE, name)]
            more["against the base"] = compare(*test)
        summary = json.loads((out / name / "summary.json").read_text(encoding="utf-8"))
        kept = ("git_commit", "versions", "n", "problems", "seed", "temperature", "confidence", "figures", "reasons")
        more["tries"] = tries(out / name)
        result = {"command": command("verl_recipes.evaluate", evaluation(name, "runs"))}
        result |= {key: summary[key] for key in (*kept, "by", "cost")} | more
        write_whole(target, json.dumps(rounded(result), indent=1) + "\n")


def tries(folder: Path) -> dict[str, dict[str, float]]:
    """What greedy and sampled responses to the test problems do, on average: `cut` and `single` (one candidate) are
    shares, `candidates` and `repeats` are numbers in a response.
    """
    found = {}
    for name, kind in (("greedy", "greedy"), ("sampled", "validation")):
        rows = [row for row in read_lines(RunFolder(folder).samples_of(kind, 0)) if row["set"] == "test"]
        problems = [row["ground_truth"] for row in rows]
        done = [
            behaviours(row["response"], each["numbers"], each["target"])
            for row, each in zip(rows, problems, strict=True)
        ]
        found[name] = {
            "cut": fmean(row["truncated"] for row in rows),
            "single": fmean(each["candidates"] == 1 for each in done),
            "candidates": fmean(each["candidates"] for each in done),
            "repeats": fmean(each["repeats"] for each in done),
        }
    return found


def rounded(value: Any) -> Any:
    """Floats with six digits after the point: what is committed should be readable."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def load() -> dict[str, dict[str, Any]]:
    """The measured figures, by model."""
    files = {name: RESULTS / f"{name}.json" for name in MODELS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def over_seeds(results: dict[str, dict[str, Any]], name: str) -> list[float] | None:
    """Mean of a figure over the three seeds, with Student's interval over seeds."""
    values = [results[seed]["figures"][name][0] for seed in SEEDS if seed in results]
    return figure(values, share=False) if len(values) == len(SEEDS) else None


def environment() -> jinja2.Environment:
    """For the templates of this folder; the filter `figure` writes a value with its interval."""
    loader = jinja2.FileSystemLoader(RESULTS)
    made = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["figure"] = interval
    made.filters["commit"] = lambda commit: commit[:10] + commit[40:] if commit else "-"  # `-dirty` stays
    return made


def page(template: str, results: dict[str, dict[str, Any]]) -> str:
    """One of the pages."""
    files = sorted((RESULTS / "middle").glob("seed*.json"))
    middle = {file.stem.removeprefix("seed"): json.loads(file.read_text(encoding="utf-8")) for file in files}
    means = {name: [each["tests"][test][place] for each in middle.values()] for name, (test, place) in RUNGS.items()}
    return (
        environment()
        .get_template(template)
        .render(
            results=results,
            models=MODELS,
            seeds=SEEDS,
            random=RANDOM,
            n=N,
            gpu_runs=GPU_RUNS,
            over_seeds={
                name: over_seeds(results, name) for name in (f"mean@{N}", f"pass@{N}", f"majority@{N}", "greedy")
            },
            middle=middle,
            rungs=RUNGS,
            over_middle={
                name: figure([each[0] for each in some], share=False) for name, some in means.items() if some[1:]
            },
            mean_of_middle=lambda name, key: fmean(each["models"][name][key] for each in middle.values()),
            data_command=command("data_prep", DATA),
            sft_command=command("verl_recipes.tiny_base", SFT_RUN),
            commands={name: command("verl_recipes.evaluate", evaluation(name, "runs")) for name in MODELS},
        )
    )


def main(arguments: list[str]) -> None:
    options = dict(each.split("=", 1) for each in arguments if "=" in each)
    if strange := options.keys() - {"runs"} | {each for each in arguments if "=" not in each} - {"measure", "page"}:
        sys.exit(f"error: {', '.join(sorted(strange))}: the arguments are measure, page and runs=FOLDER")
    if "measure" in arguments:
        measure(options.get("runs", "runs"))
    for template, path in PAGES.items():
        (ROOT / path).write_text(page(template, load()), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
