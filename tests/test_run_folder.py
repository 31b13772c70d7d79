"""The folder of a run: what is deleted and what never is, what is read of files that a killed process left."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import UserError
from verl_recipes.run import evaluation, fingerprint
from verl_recipes.run.folder import (
    MARK,
    RunFolder,
    append_line,
    as_lines,
    mark_of,
    pack,
    parse_lines,
    read_json,
    read_lines,
    why_not_emptied,
    write_whole,
)
from verl_recipes.run.preflight import Inputs, check_place
from verl_recipes.run.weights import check_replaced

NAMES = st.sampled_from(["a", "b", "run", "checkpoints", "samples", "model", "中 [x]"])
ENTRIES = st.lists(
    st.tuples(
        st.lists(NAMES, min_size=1, max_size=4),
        st.sampled_from(["file", "folder", "link", "mark", "false mark"]),
        st.lists(NAMES, max_size=3),  # where a link points to
    ),
    max_size=25,
)


def build(root, entries):
    """A tree of files, folders, links anywhere within it, and marked folders."""
    for parts, kind, target in entries:
        path = root.joinpath(*parts)
        if any(parent.is_symlink() or parent.is_file() for parent in (path, *path.parents)) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_text("x")
        elif kind == "link":
            path.symlink_to(root.joinpath(*target))
        else:
            path.mkdir()
        if kind == "mark":
            RunFolder(path).write_mark("run")
            (path / "checkpoints").mkdir()
        if kind == "false mark":
            (path / MARK).write_text('{"made_by": "somebody else"}')


def contents(root):
    """Every path below a folder, with what it holds; links are not followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            found[path] = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_text()
    return found


@pytest.mark.slow
@settings(max_examples=150)
@given(ENTRIES, st.integers(0, 24), st.lists(NAMES, max_size=2))
@example([(["run"], "mark", []), (["run", "a"], "mark", [])], 0, [])  # a run in a run
def test_nothing_outside_a_marked_run_is_ever_deleted(tmp_path_factory, entries, chosen, here):
    root = tmp_path_factory.mktemp("tree")
    build(root, entries)
    folder, said = root.joinpath(*entries[chosen % len(entries)][0]) if entries else root, []
    before, back, real = contents(root), os.getcwd(), Path(os.path.realpath(folder))
    working = root.joinpath(*here)
    os.chdir(working if working.is_dir() else root)
    marked = bool(mark_of(folder))
    try:
        RunFolder(folder).empty(said.append)
    except (UserError, NotADirectoryError):
        assert not said
    finally:
        current = Path.cwd()
        os.chdir(back)
    after = contents(root)
    gone = before.keys() - after.keys()
    assert after.items() <= before.items()
    if gone:
        assert marked
        assert len(said) == 1
        assert all(real in path.parents for path in gone)
        assert not any(path.name == MARK and '"countdown-zero"' in str(before[path]) for path in gone - {real / MARK})
        assert real != current
        assert real not in current.parents


def test_a_link_in_a_run_is_unlinked_and_what_it_points_to_stays(tmp_path):
    disk = tmp_path / "other disk" / "global_step_4"
    disk.mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints.symlink_to(disk.parent)
    run.write_mark("run")
    said = []
    run.empty(said.append)
    assert run.is_new()
    assert disk.is_dir()
    assert "1 checkpoints included: checkpoints, run.json" in said[0]


def test_what_is_deleted_is_said_before(tmp_path):
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / "global_step_4").mkdir(parents=True)
    run.write_mark("run")

    def say(line):
        assert "1 checkpoints" in line
        assert (run.checkpoints / "global_step_4").exists()

    run.empty(say)
    assert run.is_new()


def test_a_run_whose_checkpoints_lie_elsewhere_is_not_emptied(tmp_path):
    (tmp_path / "elsewhere" / "global_step_4").mkdir(parents=True)
    run = RunFolder(tmp_path / "run", tmp_path / "elsewhere")
    run.path.mkdir()
    run.write_mark("run")
    for folder in (run, RunFolder(run.path), RunFolder(run.path, run.path / "checkpoints")):  # the mark knows the place
        with pytest.raises(UserError, match="has its checkpoints in"):
            folder.empty(print)
    assert mark_of(run.path)


def test_a_run_whose_deletion_was_interrupted_is_no_other_commands(tmp_path, monkeypatch):
    run, deleted = RunFolder(tmp_path), []
    for name in ("checkpoints", "samples", "model"):
        (tmp_path / name).mkdir()
    run.config.write_text("seed: 0")
    run.summary.write_text("{}")  # it says that all is there
    run.write_mark("run")
    monkeypatch.setattr(Path, "unlink", lambda path, **_: deleted.append(path.name))
    monkeypatch.setattr(shutil, "rmtree", lambda path: deleted.append(path.name))
    run.empty(print)
    assert (deleted[0], deleted[-2:]) == ("summary.json", ["config.yaml", MARK])


def test_checkpoints_that_lie_elsewhere_have_one_command_at_a_time(tmp_path):
    one, other = (RunFolder(tmp_path / name, tmp_path / "elsewhere") for name in "ab")
    with one.locked(), pytest.raises(UserError, match=r"another command is using .*elsewhere"), other.locked():
        pass


@pytest.mark.parametrize("inside", ["checkpoints", "of_another"])
def test_the_checkpoints_of_another_run_are_not_taken_over(tmp_path, inside):
    (other := RunFolder(tmp_path / "other")).path.mkdir()
    other.write_mark("run")
    run = RunFolder(tmp_path / "run", other.path / inside)
    for begun in (False, True):
        with pytest.raises(UserError, match=r"is in another run, .*other"):
            check_place(run)
        if not begun:
            run.path.mkdir()
            run.write_mark("run")


def test_what_the_user_put_into_the_folder_of_the_model_is_not_replaced(tmp_path):
    check_replaced(tmp_path / "none")
    (model := tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "SHA256SUMS"):
        (model / name).touch()
    check_replaced(model)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UserError, match="is a link"):
        check_replaced(tmp_path / "link")
    (model / "model-q4.gguf").touch()
    with pytest.raises(UserError, match=r"model-q4\.gguf is not of the run"):
        check_replaced(model)


def test_a_folder_in_which_the_first_write_was_cut_short_is_still_new(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.mark.with_name(f".{MARK}.partial").write_text("{")  # as a kill leaves it
    with run.locked():
        assert run.is_new()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_mark("run")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("there", "asked"), permutations(["run", "evaluation", "warm_start"], 2))
def test_a_folder_of_one_kind_is_taken_for_no_other(tmp_path, there, asked, fresh):
    RunFolder(tmp_path).write_mark(there)
    cfg, run = OmegaConf.create({"fresh": fresh}), RunFolder(tmp_path)
    begin = partial(fingerprint.begin, asked, cfg, run, Inputs(None, None, {}), print, print)
    if asked == "evaluation":
        begin = partial(evaluation.begin, cfg, run, {}, Console())
    with pytest.raises(UserError, match=f"holds no {asked}, its run.json says: {there}".replace("_", " ")):
        begin()
    assert mark_of(tmp_path)["kind"] == there


@pytest.mark.parametrize("place", ["home", "above the home", "current", "above the current"])
def test_a_home_a_working_folder_and_their_parents_are_never_emptied(tmp_path, monkeypatch, place):
    (tmp_path / "below").mkdir()
    RunFolder(tmp_path).write_mark("run")
    here = tmp_path / "below" if "above" in place else tmp_path
    if "home" in place:
        monkeypatch.setenv("HOME", str(here))
    else:
        monkeypatch.chdir(here)
    assert place.split()[-1] in why_not_emptied(tmp_path)


@pytest.mark.parametrize("what", [("-t", "tmpfs"), ("--bind",)])
def test_a_run_that_holds_another_file_system_is_not_emptied(tmp_path, what):
    (tmp_path / "disk").mkdir()  # its own: if the guard fails, what is mounted is deleted
    run = RunFolder(tmp_path / "run")
    (run.path / "samples" / "mounted").mkdir(parents=True)
    run.write_mark("run")
    target = run.path / "samples" / "mounted"
    if subprocess.run(["mount", *what, tmp_path / "disk", target], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        with pytest.raises(UserError, match="holds another file system"):
            run.empty(print)
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_folder_with_other_files_becomes_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not of a run"), RunFolder(tmp_path).locked():
        pass
    with pytest.raises(UserError, match="no run folder; nothing was deleted"):
        RunFolder(tmp_path).empty(print)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path / "run").locked():
        pass
    assert "start no second command on it" in capsys.readouterr().err


def test_a_run_folder_is_locked_by_one_command(tmp_path):
    run = RunFolder(tmp_path)
    with run.locked(), pytest.raises(UserError, match="another command"), run.locked():
        pass
    with run.locked():
        pass


LINES = st.lists(st.dictionaries(st.text(), st.integers() | st.text()), max_size=5)


@given(LINES, st.data())
def test_lines_are_read_up_to_where_a_killed_process_stopped(rows, data):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    cut = data.draw(st.integers(0, len(content)))
    whole = content[:cut].count(b"\n")
    read = parse_lines(content[:cut], "file")
    assert read[:whole] == parse_lines(content, "file")[:whole]
    assert len(read) - whole in (0, 1)  # a line that lacks its end of line alone is whole
    assert len(parse_lines(content, "file")) == len(rows)


def test_a_damaged_line_is_named_or_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b\n\n[2]\n{"c": "\xe2\x80\xa8"}\n{"d"')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2 is damaged"):
        read_lines(path)
    assert read_lines(path, skip_damaged=True) == [{"a": 1}, {"c": "\u2028"}]
    append_line(path, {"e": "文"})
    assert path.read_text(encoding="utf-8").endswith('{"d"{"e": "文"}\n')
    assert read_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(), st.text())))
def test_a_packed_file_is_read_as_before_under_both_names_and_a_new_one_replaces_it(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("packed") / "3.jsonl"
    packed = file.with_name("3.jsonl.gz")
    for written in (rows, [*rows, {"a": "b"}]):  # a run that was killed repeats its last step
        file.write_text(as_lines(written), encoding="utf-8")
        assert read_lines(file) == written
        pack(file)
        assert (list(file.parent.iterdir()), read_lines(file), read_lines(packed)) == ([packed], written, written)


def test_steps_are_listed_once_and_a_damaged_packed_file_is_named_or_left_out(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 10, 9):
        append_line(run.samples_of("train", step), {"step": step})
        pack(run.samples_of("train", step))
    append_line(run.samples_of("train", 10), {"step": 10})
    (run.samples / "train" / ".11.jsonl.partial").write_text("", encoding="utf-8")
    assert run.sample_files("train") == {step: run.samples_of("train", step) for step in (2, 9, 10)}
    packed = run.samples / "train" / "2.jsonl.gz"
    for damaged in (packed.read_bytes()[:-9], b"x", packed.read_bytes()[:12] + b"x" + packed.read_bytes()[13:]):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"2\.jsonl\.gz is damaged"):
            read_lines(run.samples_of("train", 2))
        assert read_lines(run.samples_of("train", 2), skip_damaged=True) == []


def test_a_file_is_whole_at_every_moment_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "deep" / "中文.json"
    write_whole(path, '{"a": "文"}')
    assert read_json(path, "") == {"a": "文"}
    assert [entry.name for entry in path.parent.iterdir()] == ["中文.json"]
    write_whole(path, "{")
    with pytest.raises(UserError, match=r"is damaged .*; make it again"):
        read_json(path, "make it again")
