"""python -m verl_recipes.play model=runs/tiny-seed0: give a model numbers and a target, and watch it think.

The thought is shown while it is written, then the verdict of the reward `countdown` with its reason, and a solution
of the exact solver if the model failed. Without numbers= and target= it asks for them.

    python -m verl_recipes.play model=runs/tiny-seed0
    python -m verl_recipes.play model=assets/tiny_base numbers=[11,18,25] target=77 temperature=0
"""

import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field

from data_prep.cli import CONFIGS, Checked, Count, Integer, Number, PathText, Seed, Size, Text, UserError, command
from data_prep.prompts import messages_for
from data_prep.render import load_tokenizer, render
from data_prep.solver import solve
from reward_score.__main__ import explain
from reward_score.countdown import compute_score
from verl_recipes.run.model import check_model
from verl_recipes.run.weights import find_prompt, find_weights, hugging_face


class Keys(Checked):
    model: PathText = Field(
        description="an exported folder, a run's folder, a checkpoint of verl's, a Hugging Face folder or name"
    )
    prompt: Text | None = Field(
        description="of configs/prompt; null: that of the export or the run, else tinyzero_base"
    )
    numbers: Annotated[list[Size], Field(min_length=1)] | None = Field(description="of one problem; null asks")
    target: Integer | None = Field(description="of one problem")
    temperature: Annotated[Number, Field(ge=0)] | None = Field(
        description="null: the model's own; 0: always the likeliest token"
    )
    max_tokens: Count | None = Field(description="null: the model's own, else 1024")
    seed: Seed | None = Field(description="null: another answer each time")


EXAMPLE = "11 18 25 = 77"
ASK = f"numbers and target, such as {EXAMPLE} (an empty line ends): "


def printable(text: str) -> str:
    """The text with its control characters escaped: a model's output must not control the terminal.

    >>> printable("a\\x1b[31mb\\nc")
    'a\\\\x1b[31mb\\nc'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def show_piece(text: str, stream_end: bool = False) -> None:
    """Print a piece of a response as soon as it is whole."""
    print(printable(text), end="\n" if stream_end else "", flush=True)


def read_problem(line: str) -> tuple[list[int], int]:
    """The numbers and the target in a line.

    >>> read_problem("11, 18 25 = 77")
    ([11, 18, 25], 77)
    """
    if not re.fullmatch(r"\s*\d+([\s,]+\d+)+\s*=\s*\d+\s*", line):
        raise UserError(f"{line!r} is no problem; numbers, an equals sign and a target are expected: {EXAMPLE}")
    *numbers, target = map(int, re.findall(r"\d+", line))
    return numbers, target


def verdict(response: str, numbers: list[int], target: int) -> str:
    """The reward's verdict, and a solution if the response is wrong."""
    truth = {"numbers": numbers, "target": target}
    score = compute_score("play", response, truth)
    text = f"{score['reason']} (reward {score['score']:g}): {explain(response, truth)}"
    if score["acc"]:
        return text
    try:
        solution = solve(numbers, target)
    except ValueError as error:
        return f"{text}\nthe solver cannot tell: {error}"
    if solution is None:
        return f"{text}\nthere is no solution: nothing that uses each of these numbers once makes {target}"
    return f"{text}\na solution: {solution.expression} = {target} (one of {solution.solutions})"


class Player:
    """A model, its tokenizer and its prompt."""

    def __init__(self, cfg: DictConfig) -> None:
        path = Path(cfg.model)
        weights = find_weights(path)
        with tempfile.TemporaryDirectory() as scratch:
            folder = hugging_face(weights, Path(scratch) / "merged", Path(scratch) / "log.txt")
            check_model(str(folder))
            import torch
            from transformers import AutoModelForCausalLM, set_seed
            from transformers.utils.logging import disable_progress_bar

            if cfg.seed is not None:
                set_seed(cfg.seed)
            disable_progress_bar()
            self.prompt = find_prompt(cfg.prompt, path, folder)
            self.tokenizer = load_tokenizer(str(folder), self.prompt)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        own = self.model.generation_config
        temperature = own.temperature if cfg.temperature is None else cfg.temperature
        limit = cfg.max_tokens or own.max_new_tokens or 1024
        self.options = {"max_new_tokens": limit, "do_sample": temperature != 0, "temperature": temperature or 1.0}
        self.options["repetition_penalty"] = 1.0  # as in every rollout, whatever the model's configuration says

    def answer(self, numbers: list[int], target: int) -> str:
        """The model's response, shown while it is written."""
        import torch
        from transformers import TextStreamer

        options = self.prompt.get("template_options", {})
        _, ids = render(self.tokenizer, messages_for(self.prompt, numbers, target), **options)
        prompt = torch.tensor([ids], device=self.model.device)
        screen = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        screen.on_finalized_text = show_piece
        with torch.inference_mode():
            output = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=screen, **self.options
            )
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def play(self, numbers: list[int], target: int) -> None:
        """One problem, from thought to verdict."""
        print(f"\n{numbers} to {target}")
        print(f"\n{verdict(self.answer(numbers, target), numbers, target)}")


@command("play", Keys, CONFIGS / "commands")
def main(cfg: DictConfig) -> None:
    if (cfg.numbers is None) != (cfg.target is None):
        raise UserError("numbers= and target= belong together; without both, you are asked")
    player = Player(cfg)
    if cfg.numbers is not None:
        player.play(list(cfg.numbers), cfg.target)
        return
    with suppress(EOFError):  # the end of the input
        while line := input(f"\n{ASK}").strip():
            try:
                player.play(*read_problem(line))
            except UserError as error:
                print(error)


if __name__ == "__main__":
    main()
