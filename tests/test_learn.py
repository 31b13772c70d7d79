"""The path of learn/: every script runs, and what its pages show was recorded."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from commands import ROOT, Command

from data_prep.cli import UserError

LEARN = ROOT / "learn"
SCRIPTS = sorted(path.stem for path in LEARN.glob("[1-6]_*.py"))
RECORDED = sorted(path.stem for path in (LEARN / "curves").glob("*.jsonl"))
SMALL = ["steps=2", "prompts=4", "n=4", "held_out=2"]


@pytest.fixture
def run(monkeypatch, small_data, tmp_path):
    """Runs a script with options, cell by cell as a notebook does; returns the lines of its curve."""
    monkeypatch.syspath_prepend(LEARN)
    import common

    monkeypatch.setattr(common, "RUNS", tmp_path)
    monkeypatch.setattr(common, "DATA", Path(small_data[0].partition("=")[2]).parent)

    def go(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
        names = {"__name__": "__main__"}
        for cell in re.split(r"^(?=# %%)", (LEARN / f"{script}.py").read_text(encoding="utf-8"), flags=re.M):
            exec(compile(cell, script, "exec"), names)
        return common.read_curve("-".join([script, *options]))

    return go


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_opens_with_its_story_and_has_cells(script):
    text = (LEARN / f"{script}.py").read_text(encoding="utf-8")
    assert text.startswith(f'"""python learn/{script}.py [key=value ...]: ')
    assert len(text.splitlines()) < 150
    assert text.count("\n# %%") >= 3


@pytest.mark.slow
def test_a_script_runs_cell_by_cell_and_leaves_its_curve(run, tmp_path):
    for script in SCRIPTS[:5]:
        *steps, last = run(script, *SMALL)
        assert [line["step"] for line in steps] == [1, 2]
        assert all(math.isfinite(value) for line in [*steps, last] for value in line.values())
        assert all(line["gradient_norm"] > 0 for line in steps)
        assert 0 <= last["held_out"] <= 1
        assert (tmp_path / f"{'-'.join([script, *SMALL])}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_its_idea_a_script_is_the_one_before(run):
    """Weights of one update, and no KL: the same samples, and the same gradient but for the rounding."""
    group, clip = run("3_group", *SMALL), run("4_clip", *SMALL, "updates=1")
    for before, after in zip(group[:2], clip[:2], strict=True):
        assert before["tokens"] == after["tokens"]
        assert before["gradient_norm"] == pytest.approx(after["gradient_norm"], rel=0.01)
    clip, kl = run("4_clip", *SMALL), run("5_kl", *SMALL, "kl=0.0")
    assert [line["acc"] for line in clip[:2]] == [line["acc"] for line in kl[:2]]
    assert clip[1]["gradient_norm"] == pytest.approx(kl[1]["gradient_norm"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "paid"),
    [
        ("3+4=7 yes</think>\n<answer> 3+4 </answer>", {"countdown": 1.0, "format": 1.0}),
        ("3-4=7 yes</think>\n<answer> 3-4 </answer>", {"countdown": 0.1, "format": 1.0}),
        ("3-4=1 no</think>\n<answer>", {"countdown": 0.0, "format": 0.0}),
    ],
)
def test_a_reward_that_can_be_gamed_pays_for_what_it_sees(run, text, paid):
    import common

    verdict = common.countdown.compute_score("", text, {"numbers": [3, 4], "target": 7})
    assert {name: common.REWARDS[name](verdict, []) for name in paid} == paid
    assert common.REWARDS["length"](verdict, [0] * common.LONGEST) == 1.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(("rate=1", "no such key"), ("steps=x", "steps=12"), ("reward=none", "no such reward")),
        *(("n=1", "2 or more"), ("prompts=1", "2 or more"), ("held_out=1", "2 or more")),
    ],
)
def test_a_wrong_option_is_one_line(run, option, message):
    with pytest.raises(UserError, match=message):
        run("3_group", option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *((f"updates={value}", "1 or more") for value in ("0", "-4")),
        *((f"updates={value}", "a value such as updates=4") for value in ("1.5", "four", "")),
        *((f"updates={value}", f"updates={value} does not divide the 256 responses") for value in (7, 512)),
        *((f"{key}={value}", "0 or more") for key in ("lr", "clip") for value in ("-1", "nan", "inf")),
        ("optimizer=zero", "one of SGD, Adam, AdamW"),
    ],
)
def test_an_odd_option_is_refused_before_a_model_is_loaded(run, option, message):
    with pytest.raises(UserError, match=message):
        run("4_clip", option)


@pytest.mark.slow
def test_the_last_script_ends_as_its_command_does(monkeypatch, capfd, run):
    """Its folder holds something else, which the command says in one line."""
    import common

    (common.RUNS / "6_in_verl-steps=2.verl").mkdir()
    (common.RUNS / "6_in_verl-steps=2.verl" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        run("6_in_verl", "steps=2")
    assert end.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "holds files that are not of a run" in line


def test_the_last_script_points_every_setting_of_the_one_before_at_verls_configuration(run, capsys):
    run("6_in_verl", "start=0")
    *rows, command = capsys.readouterr().out.splitlines()
    said = dict(re.findall(r"^    (\w+)=([^,\n]+),", (LEARN / "5_kl.py").read_text(encoding="utf-8"), re.M))
    shown = dict(match.groups() for row in rows if (match := re.match(r"5_kl.py:\d+ +(\w+)=\S+, +(\S+ = .+)", row)))
    assert shown.keys() == said.keys() - {"held_out"}
    for name, value in said.items():
        if name not in ("held_out", "reward", "updates"):  # 8 prompts an update are 4 updates of 32
            assert float(shown[name].partition(" = ")[2]) == float(value)
    assert command.startswith("python -m verl_recipes.train ")


def test_the_error_is_over_problems_however_many_responses_each_has(run):
    """The error of a mean of independent values, one a problem: sqrt(p (1 - p) / (problems - 1))."""
    import common

    def samples(n):
        return [common.Sample([problem], [], [], 0.0, float(problem < 3)) for problem in range(4) for _ in range(n)]

    assert common.standard_error(samples(1)) == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert common.standard_error(samples(8)) == common.standard_error(samples(1))


@pytest.mark.parametrize("name", RECORDED)
def test_the_pages_show_each_recorded_run(run, name):
    import common

    for language in ("", "zh/"):
        pages = (ROOT / "docs" / language / "learn").glob("*.md")
        assert any(f"\n{common.row(name)}\n" in page.read_text(encoding="utf-8") for page in pages), common.row(name)


def test_the_recorded_curves_of_verl_lie_within_noise_of_the_last_scripts_as_the_pages_show(run):
    """Three standard errors, over problems and seeds, in each quarter, the whole curve, and on the held-out problems.

    verl's steps have as many problems as ours, its test set twice as many.
    """
    import common

    pairs = [
        (common.read_curve(f"5_kl{seed}"), common.read_curve(f"6_in_verl{seed}")) for seed in ("", "-seed=1", "-seed=2")
    ]
    assert {len(lines) for pair in pairs for lines in pair} == {13}
    parts = [slice(start, start + common.WINDOW) for start in range(0, 12, common.WINDOW)]
    for part, key, share in [(part, "acc", 1) for part in (*parts, slice(12))] + [(slice(12, 13), "held_out", 1 / 2)]:
        lines = [both for ours, verls in pairs for both in zip(ours[part], verls[part], strict=True)]
        one, other = (fmean(each[side][key] for each in lines) for side in (0, 1))
        error = math.hypot(*(ours[f"{key}_error"] for ours, _ in lines)) / len(lines) * math.sqrt(1 + share)
        assert abs(other - one) < 3 * error
        for language in ("", "zh/"):
            page = (ROOT / "docs" / language / "learn" / "6_in_verl.md").read_text(encoding="utf-8")
            assert f"| {one:.3f} | {other:.3f} | {other - one:.3f} ± {error:.3f} |" in page


@pytest.mark.long
@pytest.mark.end_to_end
def test_the_last_script_trains_in_verl():
    subprocess.run([sys.executable, "-m", "data_prep"], cwd=ROOT, check=True)
    options = ["steps=2", "seed=90210"]  # a seed that nobody types
    run = ROOT / "runs" / "learn" / f"6_in_verl-{'-'.join(options)}.verl"
    shutil.rmtree(run, ignore_errors=True)  # the script would go on with it
    command = Command(sys.executable, "learn/6_in_verl.py", *options)
    assert command.wait() == 0, command.output
    assert run.is_dir()
    shutil.rmtree(run)
    *steps, last = [json.loads(line) for line in command.output.splitlines() if line.startswith('{"')]
    assert [line["step"] for line in steps] == [1, 2]
    assert 0 < last["held_out"] < 1
