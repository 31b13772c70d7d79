"""The checkpoints of a run, as verl writes them: which are there, which are whole, and how to go on from one."""

import shutil
import zipfile
from pathlib import Path

from data_prep.cli import UserError

TRACKER = "latest_checkpointed_iteration.txt"  # verl writes the step into it when a checkpoint is whole


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that are there, the newest first; of one that verl removed, the folder stays."""
    names = (path.parent.name.removeprefix("global_step_") for path in checkpoints.glob("global_step_*/actor"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def damage(checkpoint: Path) -> str:
    """Which file of a checkpoint is damaged or missing, as a sentence; "" for none. torch keeps checksums in them."""
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


def way_on(checkpoints: Path, below: float = float("inf")) -> str:
    """The command after which a run goes on from its newest whole checkpoint of a step less than `below`."""
    for step in checkpoint_steps(checkpoints):
        if step < below and not damage(checkpoints / f"global_step_{step}"):
            return f"`echo {step} > {checkpoints / TRACKER}` to go on after step {step}"
    return "fresh=true to start anew"


def last_checkpoint(checkpoints: Path) -> int:
    """The step of the last whole checkpoint, 0 if there is none."""
    text = (checkpoints / TRACKER).read_text(encoding="utf-8") if (checkpoints / TRACKER).exists() else "0"
    if not text.strip().isdecimal():
        raise UserError(f"{checkpoints / TRACKER} is damaged; {way_on(checkpoints)}")
    return int(text)


def remove_old(checkpoints: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to the last whole one; null or 0 keeps all.

    Each process of verl's counts its own checkpoints alone, so those of earlier starts would never be removed.
    """
    last = last_checkpoint(checkpoints)
    older = [step for step in checkpoint_steps(checkpoints) if step <= last]
    for step in older[keep:] if keep and keep > 0 else []:
        shutil.rmtree(checkpoints / f"global_step_{step}", ignore_errors=True)
