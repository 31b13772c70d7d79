"""The checkpoints of a run, as verl writes them: which exist, which are whole, and how to continue from one."""

import shutil
import zipfile
from pathlib import Path

from data_prep.cli import UserError

TRACKER = "latest_checkpointed_iteration.txt"  # verl writes the step into it when a checkpoint is whole


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints, newest first. verl leaves an empty folder of a checkpoint that it removed."""
    names = (path.parent.name.removeprefix("global_step_") for path in checkpoints.glob("global_step_*/actor"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def checkpoint_error(checkpoint: Path) -> str:
    """Which file of a checkpoint is damaged or missing, as a sentence; "" for none. torch's files hold checksums."""
    ranks = list((checkpoint / "actor").glob("model_world_size_*_rank_*.pt"))
    world = int(ranks[0].name.split("_")[3]) if ranks else 1
    expected = [checkpoint / "actor" / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    # After the ranks' files verl writes data.pt (and an asynchronous trainer its queue).
    for file in dict.fromkeys([checkpoint / "data.pt", *expected, *sorted(checkpoint.rglob("*.pt"))]):
        try:
            with zipfile.ZipFile(file) as content:
                damaged = content.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            damaged = str(error)
        if damaged:
            return f"{file} is damaged ({damaged})"
    return ""


def how_to_continue(checkpoints: Path, below: float = float("inf")) -> str:
    """The command that makes a run continue from its newest whole checkpoint of a step below `below`."""
    for step in checkpoint_steps(checkpoints):
        if step < below and not checkpoint_error(checkpoints / f"global_step_{step}"):
            return f"`echo {step} > {checkpoints / TRACKER}` to go on after step {step}"
    return "fresh=true to start anew"


def last_checkpoint(checkpoints: Path) -> int:
    """The step of the last whole checkpoint, 0 if there is none."""
    text = (checkpoints / TRACKER).read_text(encoding="utf-8") if (checkpoints / TRACKER).exists() else "0"
    if not text.strip().isdecimal():
        raise UserError(f"{checkpoints / TRACKER} is damaged; {how_to_continue(checkpoints)}")
    return int(text)


def remove_old(checkpoints: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to the last whole one; null or 0 keeps all.

    verl removes only checkpoints that the same process wrote, so those of earlier starts would stay.
    """
    last = last_checkpoint(checkpoints)
    older = [step for step in checkpoint_steps(checkpoints) if step <= last]
    for step in older[keep:] if keep and keep > 0 else []:
        shutil.rmtree(checkpoints / f"global_step_{step}", ignore_errors=True)
