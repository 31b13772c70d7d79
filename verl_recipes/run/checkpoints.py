"""The checkpoints of a run, as verl writes them: which exist, which are whole, and how to continue from one."""

import os
import shlex
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from data_prep.cli import UserError
from data_prep.folder import to_disk
from verl_recipes.run.folder import read_json
from verl_recipes.run.hashes import SUMS, changed, compared, seal

LOOK = 1.0  # seconds between two looks for a new checkpoint
RESHARDED = ".resharded-"  # begins the name of a rank's part of a checkpoint of another number of ranks
TRACKER = "latest_checkpointed_iteration.txt"  # verl writes the step into it when a checkpoint is whole


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints, newest first. verl leaves an empty folder of a checkpoint that it removed."""
    names = (path.parent.name.removeprefix("global_step_") for path in checkpoints.glob("global_step_*/actor"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def ranks_of(folder: Path) -> int:
    """How many ranks saved the engine in this folder of a checkpoint; 0 if there is none.

    Beside their files may lie those of another number, from an earlier start that did not come to the end of saving.
    """
    config = folder / "fsdp_config.json"
    known = read_json(config, "take the checkpoint before").get("world_size") if config.exists() else None
    return known or max((int(file.name.split("_")[3]) for file in folder.glob("model_world_size_*")), default=0)


def files_of(checkpoint: Path) -> list[Path]:
    """The files of torch's that should be in a checkpoint. Each ends with a list of what is in it."""
    world = ranks_of(checkpoint / "actor") or 1
    expected = [checkpoint / "actor" / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    theirs = [file for file in sorted(checkpoint.rglob("*.pt")) if f"_size_{world}_" in file.name]
    # verl writes this after the ranks' files (and an asynchronous trainer its queue); a warm start's has a number.
    data = next(checkpoint.glob("data_*.pt"), checkpoint / "data.pt")
    return list(dict.fromkeys([data, *expected, *theirs]))


def cut_short(checkpoint: Path) -> str:
    """Which file of a checkpoint is missing or lacks its end, without reading the rest of it; "" for none.

    torch does not notice that a disk is full when it closes a file, and nodes may not share the run's folder.
    """
    lacking = [file for file in files_of(checkpoint) if not zipfile.is_zipfile(file)]
    return f"{lacking[0]} is missing or cut short" if lacking else ""


def checkpoint_error(checkpoint: Path) -> str:
    """Which file of a checkpoint is damaged or missing, as a sentence; "" for none.

    SHA256SUMS decides. If the run was killed before it was written, the checksums in torch's files do.
    """
    try:
        if (checkpoint / SUMS).is_file():
            return changed(checkpoint)
        files = files_of(checkpoint)
    except UserError as error:  # about the hashes, or fsdp_config.json
        return error.message
    for file in files:
        try:
            with zipfile.ZipFile(file) as content:
                damaged = content.testzip()
        except Exception as error:  # a flipped bit in a header makes zipfile raise nearly anything
            damaged = str(error) or repr(error)
        if damaged:
            return f"{file} is damaged ({damaged})"
    return ""


def last_whole(checkpoints: Path, below: float) -> int:
    """The step of the newest whole checkpoint of a step less than `below`, 0 if there is none."""
    steps = (step for step in checkpoint_steps(checkpoints) if step < below)
    return next((step for step in steps if not checkpoint_error(checkpoints / f"global_step_{step}")), 0)


def how_to_continue(checkpoints: Path, below: float = float("inf")) -> str:
    """The command that makes a run continue from its newest whole checkpoint of a step below `below`."""
    if step := last_whole(checkpoints, below):
        return f"`echo {step} > {shlex.quote(str(checkpoints / TRACKER))}` to go on after step {step}"
    return "fresh=true to start anew"


def actor_identity(actor: Path) -> dict[str, str]:
    """The hash of each file of a checkpoint's `actor` that decides what the model computes.

    Raises:
        UserError: a file is not what SHA256SUMS records; the message names the checkpoint before.
    """
    hashes, wrong = compared(actor)
    if wrong:
        checkpoint = actor.absolute().parent
        step = checkpoint.name.removeprefix("global_step_")
        before = last_whole(checkpoint.parent, int(step)) if step.isdecimal() else 0
        name = checkpoint.parent / f"global_step_{before}"
        raise UserError(f"{wrong}; {f'take the checkpoint before, {name}' if before else 'take another checkpoint'}")
    return hashes


def last_checkpoint(checkpoints: Path) -> int:
    """The step of the last whole checkpoint, 0 if there is none."""
    text = (checkpoints / TRACKER).read_text(encoding="utf-8") if (checkpoints / TRACKER).exists() else "0"
    if not text.strip().isdecimal():
        raise UserError(f"{checkpoints / TRACKER} is damaged; {how_to_continue(checkpoints)}")
    return int(text)


def old_steps(checkpoints: Path, keep: int | None, best: int = 0) -> list[int]:
    """The steps of the checkpoints up to the last whole one, but for the newest `keep` and that of step `best`.

    Without `keep`, null or 0, all are to stay.
    """
    last = last_checkpoint(checkpoints)
    older = [step for step in checkpoint_steps(checkpoints) if step <= last]
    return [step for step in older[keep:] if step != best] if keep and keep > 0 else []


def remove_old(checkpoints: Path, keep: int | None, best: int = 0) -> None:
    """Remove the checkpoints of `old_steps`.

    verl would remove only those that the same process wrote, and the last one's actor before the next one is whole.
    """
    old, last = old_steps(checkpoints, keep, best), checkpoints / f"global_step_{last_checkpoint(checkpoints)}"
    if not old or cut_short(last):
        return
    to_disk(last, checkpoints / TRACKER)  # verl does not wait for that
    for step in old:
        shutil.rmtree(checkpoints / f"global_step_{step}", ignore_errors=True)


def unsealed(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that verl has saved and that have no hashes yet."""
    last = last_checkpoint(checkpoints)
    steps = (step for step in checkpoint_steps(checkpoints) if step <= last)
    return [step for step in steps if not (checkpoints / f"global_step_{step}" / SUMS).exists()]


@contextmanager
def sealing(checkpoints: Path, tidy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Meanwhile, write the hashes of each checkpoint once verl has saved it, beside training and not within a step.

    At the end the block waits for those that are left, unless it ends by Ctrl-C or SIGTERM. Then and meanwhile it calls
    `tidy`.
    """
    last, ended, patient = last_checkpoint(checkpoints), threading.Event(), True
    earlier = unsealed(checkpoints)  # their run was killed before their hashes were written
    for step in takewhile(lambda step: step > last, checkpoint_steps(checkpoints)):  # verl does not go on from these
        checkpoint = checkpoints / f"global_step_{step}"
        (checkpoint / SUMS).unlink(missing_ok=True)  # it is saved again
        with suppress(UserError):  # its fsdp_config.json is damaged
            if cut_short(checkpoint):  # a kill ended its save; later it would count as one to keep
                shutil.rmtree(checkpoint, ignore_errors=True)

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # training goes first
        # Hashes written now would call these whole.
        damaged = {step for step in earlier if checkpoint_error(checkpoints / f"global_step_{step}")}
        while True:
            over = ended.wait(LOOK)
            with suppress(OSError, UserError):  # verl removes a checkpoint, or is writing the step of the last one
                tidy()
                for step in unsealed(checkpoints):
                    if step in damaged:
                        continue
                    checkpoint = checkpoints / f"global_step_{step}"
                    if error := cut_short(checkpoint):
                        damaged.add(step)
                        why = "is the disk full, or do the nodes not share this folder?"
                        print(f"warning: {error}; older checkpoints stay ({why})", file=sys.stderr)
                    else:
                        seal(checkpoint)
            if over:
                break

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the next start checks and hashes what is left
        patient = False
        raise
    finally:
        ended.set()
        if patient:
            thread.join()
