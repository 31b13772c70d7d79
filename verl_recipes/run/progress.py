"""Shows what a run is doing and how long it will take, read from the files that the run writes."""

import math
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from verl_recipes.run.folder import RunFolder, parse_lines


def clock(seconds: float) -> str:
    """Minutes and seconds, from an hour on with the hours before them.

    >>> clock(81.9), clock(72_000)
    ('1:21', '20:00:00')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Tail:
    """The whole JSON lines that a file gained since the last `read`."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self.offset += len(whole)
        return parse_lines(whole, self.path, skip_damaged=True)  # a full disk cuts one of verl's lines short


def metric_text(value: float | None, form: str) -> str:
    """A metric as text. verl's file logger writes null for a number that is not finite."""
    return "not finite" if value is None else format(value, form)


class Display:
    """A progress bar on a terminal; elsewhere a line for each event."""

    starting = "starting Ray and the training engine (half a minute)"

    def __init__(self, console: Console, run: RunFolder, first_step: int, steps: int) -> None:
        self.console, self.steps, self.first_step = console, steps, first_step
        # FORCE_COLOR makes rich take a log for a terminal, and TERM=dumb is one that cannot redraw a line.
        self.is_live = console.is_interactive and console.file.isatty()
        self.metrics = Tail(run.metrics_part)
        self.bar = RichProgress(
            SpinnerColumn(), BarColumn(30), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self.task = self.bar.add_task("", total=steps, completed=first_step)
        self.training_since: float | None = None

    def __enter__(self) -> Self:
        if self.is_live:
            self.bar.start()
        self.say(self.starting)
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the terminal is gone
            self.bar.stop()

    def say(self, what: str) -> None:
        self.bar.update(self.task, description=what)
        if not self.is_live:
            with suppress(OSError):  # a full disk below the log costs lines, and not the run
                self.console.print(f"{time.strftime('%H:%M:%S')} {what}", highlight=False, soft_wrap=True)

    def step(self, step: int, each: float, what: str) -> None:
        """Show a step of training, and how long the others will take, at `each` seconds a step."""
        left = clock(each * (self.steps - step))
        self.bar.update(self.task, completed=step)
        self.say(f"step {step} of {self.steps}: {what}, {each:.1f} s a step, {left} left")


class Losses(Display):
    """Of a warm start."""

    def __init__(self, console: Console, run: RunFolder, first_step: int, steps: int) -> None:
        super().__init__(console, run, first_step, steps)
        self.loss = ""
        self.held_out: dict[int, float] = {}  # the losses on held-out traces since this start, by step

    def each(self, step: int) -> float:
        """The mean seconds of a step since the first that was timed, evaluations included."""
        return (time.monotonic() - (self.training_since or 0.0)) / (step - self.first_step)

    def update(self) -> None:
        """Read the metrics and show what is new: each step on a terminal, elsewhere those with an evaluation."""
        for line in self.metrics.read():
            step, data = line["step"], line["data"]
            if "train/loss" in data:
                if self.training_since is None:  # a step is logged when it is done, so the first one is not timed
                    self.training_since, self.first_step = time.monotonic(), step
                    continue
                self.loss = metric_text(data["train/loss"], ".3f")
                if self.is_live:
                    self.step(step, self.each(step), f"loss {self.loss}")
            elif "val/loss" in data:
                self.held_out[step] = math.inf if data["val/loss"] is None else data["val/loss"]  # never the best
                if self.training_since is not None and step > self.first_step:  # with every=1 the first has no time yet
                    held_out = metric_text(data["val/loss"], ".3f")
                    self.step(step, self.each(step), f"loss {self.loss}, held out {held_out}")


class Progress(Display):
    """Of reinforcement learning and of evaluations."""

    starting = "starting Ray, the training engine and vLLM (a minute or two)"

    def __init__(self, console: Console, run: RunFolder, first_step: int, steps: int, batches: int = 1) -> None:
        super().__init__(console, run, first_step, steps)
        self.batches, self.events = batches, Tail(run.events)
        self.seconds: list[float] = []  # of each step of this start
        self.measured: list[float] = []  # when each batch of an evaluation began
        self.done: float | None = None  # when verl logged its last step, the last thing that it does

    def left(self) -> str:
        """The number of an evaluation's batch, and how long the others will take; "" if there is one batch."""
        if self.batches == 1:
            return ""
        self.measured.append(time.monotonic())
        done = len(self.measured) - 1
        self.bar.update(self.task, total=self.batches, completed=done)
        text = f", batch {done + 1} of {self.batches}"
        if done:
            text += f", {clock((self.measured[-1] - self.measured[0]) / done * (self.batches - done))} left"
        return text

    def update(self) -> None:
        """Read the files and show what is new."""
        for event in self.events.read():
            if event["event"] == "generating" and event["split"] == "validation":
                self.say(f"measuring the model at step {event['step']}: responses to the test problems{self.left()}")
            elif event["event"] == "generating" and self.training_since is None:
                self.training_since = time.monotonic()
                self.say("training")
        for line in self.metrics.read():
            step, data = line["step"], line["data"]
            if step >= self.steps:
                self.done = time.monotonic()
            if "training/global_step" not in data or self.training_since is None:
                continue
            reward, right = metric_text(data["critic/score/mean"], ".2f"), metric_text(data["reward/acc"], ".0%")
            what = f"reward {reward}, right {right}, {data['response_length/mean']:.0f} tokens"
            self.seconds.append(data["timing_s/step"])  # without tests, which have a line of their own
            self.step(step, fmean(self.seconds), what)
