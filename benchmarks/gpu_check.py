"""The stages of launch/gpu_check.sh. Each keeps a JSON file that is whole at every moment: a machine may go at any.

python benchmarks/gpu_check.py card FILE LENGTH...            the card, versions, attention against sdpa
python benchmarks/gpu_check.py model FOLDER NAME [KEY=VALUE]  random weights of the shape of configs/model/NAME.yaml
python benchmarks/gpu_check.py run FILE SECONDS STEPS ...     a training command, ended after so many steps, or so many
                                                              seconds after its first rollouts (a warm start's first
                                                              step)
python benchmarks/gpu_check.py report FOLDER                  report.md of all files in it
python benchmarks/gpu_check.py entry_points FOLDER            what an installed project has, for PYTHONPATH
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from reward_score.figures import interval
from verl_recipes.measure.intervals import figure
from verl_recipes.measure.problems import by_problem
from verl_recipes.planning.estimate import estimate
from verl_recipes.planning.memory import GIB, shape_of
from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.folder import RunFolder, read_json, read_lines, read_metrics, write_json, write_whole
from verl_recipes.run.supervise import written

START = 400  # seconds until the first rollouts; 99 to 190 were seen
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "vllm", "verl", "transformers", "ray", "flash-attn", "triton")
HEADS = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "3B": (16, 2, 128), "7B": (28, 4, 128)}  # Qwen2.5's: q, kv, width
SMI = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu,power.draw", "--format=csv,noheader,nounits"]
TIMES = {  # verl's metrics for each part of plan
    "generate": ["timing_s/gen"],
    "old log-probabilities": ["timing_s/old_log_prob"],
    "reference": ["timing_s/ref"],
    "values and critic": ["timing_s/values", "timing_s/update_critic"],
    "update": ["timing_s/update_actor"],
    "weights, sleep and wake": ["timing_s/update_weights"],
    "step": ["timing_s/step"],
}
# Of plan's memory: what the trainer's own allocator does not hold.
NOT_TORCHS = ("context", "vllm asleep", "vllm other", "vllm weights", "fragments")
FIGURES = {  # of the steps after the first, as means
    "seconds a step": "timing_s/step",
    "generate, s": "timing_s/gen",
    "update, s": "timing_s/update_actor",
    "tokens a second": "perf/throughput",
    "response tokens": "response_length/mean",
    "right": "reward/acc",
    "torch's memory at its peak, GiB": "actor/perf/max_memory_allocated_gb",
    "tokens of a batch": "train/global_tokens",
}


def said(command: list[str]) -> str:
    """What a command prints; why there is nothing."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return repr(error)


def card(file: Path, lengths: list[int]) -> int:
    """The card, the versions, and attention for each of HEADS and each length; 1 if it is off by more than bf16 may."""
    import torch

    found: dict[str, Any] = {"nvidia-smi": said(["nvidia-smi"]), "python": sys.version, "cpus": os.cpu_count()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "attention": []}
    write_json(file, found)
    for model, heads in HEADS.items():
        for length in lengths:
            found["attention"].append({"model": model, "tokens": length} | compared(device, *heads, length))
            write_json(file, found)
    found["passes"] = {}
    for name, ms in passes(device, max(lengths)):
        found["passes"][name] = ms
        write_json(file, found)
    worst = max(max(row["output"], row["gradients"]) for row in found["attention"])
    print(f"card: {found['device']}, attention differs from sdpa by {worst:.4f} at most (of the largest entry)")
    return int(worst > 0.03)  # bf16 has 8 bits


def compared(device: str, heads: int, kv: int, width: int, length: int) -> dict[str, float]:
    """torch_varlen in bf16, on sequences of `length`, 3 and 1 tokens in one row, against sdpa in fp32 on each alone.

    Returns:
        The largest difference of outputs and of gradients, as shares of the largest entry; milliseconds of a forward
        and a backward pass.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from verl_recipes.in_verl.attention import torch_varlen

    torch.manual_seed(0)
    lengths = [length, 3, 1]
    tokens = sum(lengths)
    shapes = [(1, count, tokens, width) for count in (heads, kv, kv)]
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    position_ids = torch.cat([torch.arange(each, device=device) for each in lengths])[None]
    weight = torch.randn(1, tokens, heads, width, device=device, dtype=torch.bfloat16)

    def ours() -> torch.Tensor:
        return torch_varlen(torch.nn.Module(), *inputs, None, position_ids=position_ids)[0]

    def reference() -> torch.Tensor:
        # As many heads of keys as of queries: sdpa then has a kernel that holds no 8,192 x 8,192 scores.
        whole = [x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in inputs]
        outputs = [sdpa(*part, is_causal=True) for part in zip(*(x.split(lengths, dim=2) for x in whole), strict=True)]
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def both(attention: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = attention()
        return output, list(torch.autograd.grad((output * weight).sum(), inputs))

    (output, gradients), (expected, wanted) = both(ours), both(reference)

    @torch.no_grad()
    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).abs().max() / b.float().abs().max())

    return {
        "output": difference(output, expected),
        "gradients": max(difference(a, b) for a, b in zip(gradients, wanted, strict=True)),
        "ms": milliseconds(device, lambda: both(ours)),
    }


def milliseconds(device: str, work: Callable[[], Any]) -> float:
    """Of a call, the mean of three after a first one."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    began = time.perf_counter()
    for _ in range(3):
        work()
    wait()
    return (time.perf_counter() - began) / 3 * 1000


def config_of(name: str, changes: Sequence[str] = (), **more: Any) -> Any:
    """transformers' configuration of the shape of configs/model/NAME.yaml."""
    from transformers import AutoConfig

    cfg = OmegaConf.load(ROOT / "configs/model" / f"{name}.yaml")
    cfg.architecture.merge_with_dotlist(list(changes))
    shape = shape_of(cfg)
    return AutoConfig.for_model(shape.pop("model_type"), **shape, **more, rope_theta=1e6)


def passes(device: str, tokens: int) -> Iterator[tuple[str, float]]:
    """Each part of a packed micro-batch's passes and its milliseconds in bf16, without verl: what a run's are beside.

    The shape is Qwen2.5-0.5B's, on a CPU the tiny model's. `layers` is all but the head; `head` is that of verl's fused
    kernels, by torch and, on a card, by Triton. `train` adds the backward pass.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    import verl_recipes.in_verl.attention  # noqa: F401  (registers torch_varlen)

    config = config_of("qwen2.5_0.5b" if device == "cuda" else "tiny")
    network = AutoModelForCausalLM.from_config(config, attn_implementation="torch_varlen").to(device, torch.bfloat16)
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    position_ids = (torch.arange(tokens, device=device) % 256)[None]
    hidden = torch.randn(1, tokens, config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    heads: dict[str, Callable[..., Any]] = {"torch": FusedLinearForPPO(impl_backend="torch").forward}
    if device == "cuda":
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        heads["triton"] = lambda *arguments: linear_cross_entropy(*arguments, 1.0, "none")

    def layers() -> Any:
        return network.model(input_ids=ids, position_ids=position_ids, use_cache=False)[0]

    parts: dict[str, Callable[[], Any]] = {"layers": layers}
    for name, head in heads.items():
        parts[f"head, {name}"] = partial(lambda head: head(hidden, network.lm_head.weight, ids)[0], head)
    for name, part in parts.items():
        with torch.no_grad():
            ms = milliseconds(device, part)
        yield name, ms
        yield f"{name}, train", milliseconds(device, lambda part=part: part().float().square().sum().backward())  # type: ignore[misc]


def model(folder: Path, name: str, changes: list[str]) -> int:
    """Random weights, and the tiny base's tokenizer with as many more tokens as the vocabulary is larger.

    verl masks vLLM's logits beyond the tokenizer's length, and not the actor's: without these tokens they disagree.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny_base")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = config_of(name, changes, **ids)
    network = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = read_json(file, "")
    # Not as added tokens: 150,000 of them take 5 s in each process that loads the tokenizer.
    content["model"]["vocab"] |= {f"<{number}>": number for number in range(len(tokenizer), config.vocab_size)}
    write_json(file, content)
    print(f"model: {folder} has {sum(each.numel() for each in network.parameters()):,} parameters")
    return 0


def accuracies(run: RunFolder) -> dict[int, list[float]]:
    """Of every evaluation the accuracy with its interval, by step."""
    found = {}
    for step, path in run.sample_files("validation").items():
        groups = by_problem(read_lines(path, skip_damaged=True))
        found[step] = figure(fmean(row["acc"] for row in rows) for rows in groups.values())
    return found


def end_of(path: Path, characters: int) -> str:
    """The end of a text file, without the folders of this machine; "" if there is none."""
    text = path.read_text(encoding="utf-8", errors="replace")[-characters:] if path.exists() else ""
    for folder in sorted({str(ROOT), *filter(None, sys.path)}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def measured(run: RunFolder) -> dict[str, Any]:
    """All that is to be kept of a run's folder, which may be going on."""
    return {
        "steps": read_metrics(run),
        "accuracy": accuracies(run),
        "events": read_lines(run.events, skip_damaged=True),
        "summary": read_json(run.summary, "") if run.summary.exists() else {},
        "exported": sorted(path.name for path in run.model.glob("*")),
        "config": end_of(run.config, 1_000_000),
        "log": end_of(run.log, 20_000),
    }


def run(file: Path, seconds: float, steps: int, command: list[str]) -> int:
    """Run a training command until it ends, or has done `steps` steps (0: any number).

    It is also ended `seconds` after its first rollouts (a warm start's first step), or after START seconds without one.

    Returns:
        0 if it ended well by itself, or was ended after one step or more.
    """
    (*_, run_dir) = (part.partition("=")[2] for part in command if part.startswith("run_dir="))
    folder, began, output = RunFolder(run_dir), time.time(), file.with_suffix(".txt")
    found: dict[str, Any] = {"command": shlex.join(command), "began": began, "ended": "not yet", "memory": []}
    first_step: list[float] = []  # when it was seen
    seen, trained, nothing = -1, 0, RunFolder(file.parent / "nothing")

    def stamp() -> int:
        """When the run's configuration was written last, by the clock of its file system."""
        return folder.config.stat().st_mtime_ns if folder.config.exists() else 0

    before = stamp()

    def ours() -> RunFolder:
        """The run's folder, once the command has emptied it of an earlier run, or has taken that one up."""
        return folder if stamp() != before else nothing

    def until() -> float:
        """When its time is over."""
        rollouts = [event["time"] for event in read_lines(ours().events, skip_damaged=True) if event["time"] > began]
        first = rollouts or first_step
        return first[0] + seconds if first else began + START

    def record() -> None:
        found.update(measured(ours()) | {"seconds": time.time() - began, "output": end_of(output, 3000)})
        write_json(file, found)

    with output.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `nohup ... &` has it ignored
        )
        try:
            while process.poll() is None and found["ended"] == "not yet":
                time.sleep(1)
                if shutil.which(SMI[0]):
                    found["memory"].append([round(time.time() - began, 1), said(SMI)])
                trained = sum(step > 0 for step in read_metrics(ours()))
                if trained and not first_step:
                    first_step.append(time.time())
                if (size := written(ours())) != seen:
                    seen = size
                    record()
                if steps and trained >= steps:
                    found["ended"] = "by its steps"
                elif time.time() > until():
                    found["ended"] = "by its seconds"
        finally:
            process.send_signal(signal.SIGINT)  # the run cleans up behind itself
            status = process.wait()
            found["ended"] = found["ended"] if found["ended"] != "not yet" else f"by itself, status {status}"
            record()
    output.unlink()
    well = status == 0 or (trained > 0 and "itself" not in found["ended"])
    why = "" if well else f"; {found['output'].strip().splitlines()[-1:]}"
    print(f"{file.stem}: {trained} steps in {found['seconds']:.0f} s, ended {found['ended']}{why}")
    return 0 if well else 1


def peak(data: dict[str, float]) -> float:
    """GiB that torch's allocator held at most up to a step, in the policy's engine or the critic's."""
    return max(value for name, value in data.items() if name.endswith("perf/max_memory_allocated_gb"))


def planned(found: dict[str, Any]) -> bool:
    """Whether there is something to compare: a run's steps on a card. Of a CPU and of warm starts plan says nothing."""
    trained = any("timing_s/step" in data for data in found["steps"].values())
    return trained and bool(OmegaConf.create(found["config"]).trainer.device != "cpu")


def beside_plan(found: dict[str, Any]) -> list[list[str]]:
    """Rows of what plan says of a run and what was measured: memory at the peak of training, seconds of each part."""
    steps = [data for step, data in found["steps"].items() if int(step) > 0]
    expected = estimate(OmegaConf.create(found["config"]))
    passes = [parts for phase, parts in expected["memory"].items() if phase != "generate"]
    most = max(sum(size for name, size in parts.items() if name not in NOT_TORCHS) for parts in passes)
    rows = [("GiB at the peak of training", most / GIB, max(map(peak, steps)))]
    for part, metrics in TIMES.items():
        seen = [sum(data.get(name, 0.0) for name in metrics) for data in steps[1:] or steps]
        if part in expected["seconds"] and any(seen):
            rows.append((f"seconds: {part}", expected["seconds"][part], fmean(seen)))
    return [[what, f"{plan:.2f}", f"{seen:.2f}", f"{plan / seen - 1:+.0%}"] for what, plan, seen in rows]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows]) + "\n"


def figures_of(found: dict[str, Any]) -> list[list[str]]:
    """What a reader asks first of a run."""
    steps = {int(step): data for step, data in found["steps"].items() if int(step) > 0}
    events = [event["time"] for event in found["events"] if event["time"] > found["began"]]
    rows = [["ended", found["ended"]], ["seconds", f"{found['seconds']:.0f}"]]
    rows += [["seconds until the first rollouts", f"{events[0] - found['began']:.0f}"]] if events else []
    rows += [["accuracy at step " + step, interval(value)] for step, value in found["accuracy"].items()]
    held_out = {step: data["val/loss"] for step, data in found["steps"].items() if "val/loss" in data}
    rows += [[f"loss on held-out traces at step {step}", f"{loss:.3f}"] for step, loss in held_out.items()]
    rows += [["training steps", str(len(steps))]]
    later = list(steps.values())[1:] or list(steps.values())
    for what, name in FIGURES.items():
        if values := [data[name] for data in later if name in data]:
            rows.append([f"{what}, mean after the first step", f"{fmean(values):.4g}"])
    if agree := [data[name] for data in steps.values() for name in AGREEMENT if name in data]:
        rows.append(["agreement of rollout and actor, least", f"{min(agree):.5f}"])
    if used := [float(row.split(",")[0]) for _, row in found["memory"] if row[:1].isdigit()]:
        rows.append(["GPU memory in use, most, GiB", f"{max(used) / 1024:.1f}"])
    return [*rows, ["exported", ", ".join(found["exported"]) or "-"]]


def report(folder: Path) -> int:
    """report.md."""
    parts = ["# One card\n"]
    results = {file: read_json(file, "") for file in folder.glob("*.json")}
    for file, found in sorted(results.items(), key=lambda item: item[1].get("began", 0)):
        parts.append(f"## {file.stem}\n")
        if file.stem == "card":
            rows = [
                [row["model"], str(row["tokens"]), *(f"{row[name]:.2g}" for name in ("output", "gradients", "ms"))]
                for row in found.pop("attention")
            ]
            times = [[name, f"{ms:.3g}"] for name, ms in found.pop("passes", {}).items()]
            parts.append(f"```\n{found.pop('nvidia-smi')}\n```\n")
            parts.append(table(["", ""], [[name, str(value)] for name, value in found.items()]))
            parts.append(table(["heads of", "tokens", "output off by", "gradients off by", "ms, both passes"], rows))
            parts += [table(["a micro-batch, as long as the longest above", "ms"], times)] if times else []
            continue
        parts += [f"`{found['command']}`\n", table(["", "measured"], figures_of(found))]
        if planned(found):
            parts.append(table(["", "plan", "measured", "difference"], beside_plan(found)))
    write_whole(folder / "report.md", "\n".join(parts))
    print(f"report: {folder / 'report.md'}")
    return 0


def entry_points(folder: Path) -> int:
    """A distribution that says of the checkout what pyproject.toml does, for a Python where it is not installed."""
    info = folder / "countdown_zero-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        "[verl.plugins]",
        *(f"{name} = {value}" for name, value in project["entry-points"]["verl.plugins"].items()),
    ]
    write_whole(info / "entry_points.txt", "\n".join(lines) + "\n")
    write_whole(info / "METADATA", f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    return 0


def main(what: str, place: str, *rest: str) -> int:
    path = Path(place)
    if what == "card":
        return card(path, [int(each) for each in rest])
    if what == "model":
        return model(path, rest[0], list(rest[1:]))
    if what == "run":
        return run(path, float(rest[0]), int(rest[1]), list(rest[2:]))
    return {"report": report, "entry_points": entry_points}[what](path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
