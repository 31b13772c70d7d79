"""The keys of `python -m data_prep`, its `.render` and its `.traces`: their types, ranges and meaning.

Defaults are in configs/prepare.yaml, render.yaml, commands/traces.yaml and their groups. All keys are known here,
unlike those of a training run, which verl also reads. So any other key is refused.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from data_prep.clean import MAX_NUMBER, MAX_TARGET
from data_prep.cli import Checked, Count, Integer, Number, PathText, Seed, Share, Text
from data_prep.prompts import PLACES
from data_prep.solver import MAX_COUNT

MAX_ROWS = 2**40  # more than any source has, and safe in 64-bit integers
MAX_OOD = 2**20  # a set out of distribution is made in memory


def _list(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("should be a list, such as [3,4]")
    return value


def _ascending(ends: list[int]) -> list[int]:
    if ends[0] > ends[1]:
        raise ValueError("should be [lowest,highest]")
    return ends


def _up_to(value: str) -> str:
    if not re.fullmatch("up to [1-9][0-9]*", value):
        raise ValueError("should be `up to N`")
    return value


Rows = Annotated[Integer, Field(ge=1, le=MAX_ROWS)]
UpTo = Annotated[str, AfterValidator(_up_to)]
Numbers = Annotated[Integer, Field(ge=1, le=MAX_NUMBER)]
Target = Annotated[Integer, Field(ge=1, le=MAX_TARGET)]
List = BeforeValidator(_list)
Pair = Field(min_length=2, max_length=2)
Ascending = AfterValidator(_ascending)


def optional(description: str) -> Any:
    """A key that only some options of its group have."""
    return Field(None, description=description)


class Closed(Checked):
    """Keys of a configuration; other keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Message(Closed):
    role: Text = Field(description="system, user or assistant")
    content: str = Field(description="the text; {numbers} and {target} stand for the problem")


def _shows_the_problem(messages: list[Message]) -> list[Message]:
    missing = [place for place in PLACES if not any(place in message.content for message in messages)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must occur in the messages")
    return messages


# Arguments of apply_chat_template that verl's call sets, or that would replace the prompt.
OF_THE_CALL = {"conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict"}


def _are_the_templates(options: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(options.keys() & OF_THE_CALL):
        raise ValueError(f"{', '.join(taken)} is set by the call and is no option of a template")
    if words := [f"{key}={value}" for key, value in options.items() if value in ("yes", "no", "on", "off")]:
        raise ValueError(f"{', '.join(words)} should be true or false; a template takes any word as true")
    return options


class Prompt(Closed):
    name: Text = Field(description="recorded in the manifest")
    messages: Annotated[list[Message], List, Field(min_length=1), AfterValidator(_shows_the_problem)] = Field(
        description="each with a role and a content, in which {numbers} and {target} stand for the problem"
    )
    chat_template: str | None = optional("Jinja; null: that of the tokenizer")
    template_options: Annotated[dict[str, bool | int | float | str], AfterValidator(_are_the_templates)] = optional(
        "variables of the chat template, such as {enable_thinking: false} of Qwen3's; default: {}"
    )


class Shape(Closed):
    """What generated problems look like. A set out of distribution (ood.sets) names only what differs."""

    count: Annotated[list[Annotated[Integer, Field(ge=2, le=MAX_COUNT)]], List, Field(min_length=1)] = optional(
        "how many numbers a problem has; each option is equally likely"
    )
    numbers: Annotated[list[Numbers], List, Pair, Ascending] = optional("range of the numbers")
    tiles: bool = optional("draw numbers as the television game does, instead of from the range")
    targets: Annotated[list[Target], List, Pair, Ascending] = optional(
        "range of the targets; each target that the numbers reach is equally likely"
    )
    integers: bool = optional("the target has a solution without fractions on the way")
    max_intermediate: Annotated[Integer, Field(ge=1, le=MAX_TARGET)] | None = optional(
        "and all intermediate results of that solution are in 0..max_intermediate; null: any"
    )
    must_use: Annotated[list[Literal["+", "-", "*", "/"]], List] = optional(
        'every solution uses one of these operators, such as ["*","/"]'
    )


def _check_bounds(preset: dict[str, Any], where: str) -> None:
    if preset["max_intermediate"] is None:
        return
    if not preset["integers"]:
        raise ValueError(f"{where}: max_intermediate needs integers=true")
    if preset["must_use"]:
        raise ValueError(f"{where}: max_intermediate and must_use do not go together")


class Preset(Shape):
    name: Text = Field(description="of the folder under data/")
    rows: Rows = Field(description="problems to generate; duplicates among them are dropped")
    train_size: Rows | None = Field(description="default of train_size")
    test_size: Rows | None = Field(description="default of test_size")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if missing := sorted(Preset.model_fields.keys() - self.model_fields_set):
            raise ValueError(f"has no {', '.join(missing)}")
        return self


class Columns(Closed):
    numbers: Text = Field(description="column of the numbers; metadata.numbers is a field of a nested column")
    target: Text = Field(description="column of the target")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.numbers == self.target:
            raise ValueError("numbers and target should be two columns")
        return self


class Source(Closed):
    name: Literal["synthetic", "hub", "modelscope", "local"] = Field(description="set by source=NAME")
    folder: Text = Field(description="name of the folder under data/")
    repo: Text = optional("source=hub or modelscope: owner/name of the data set")
    revision: Text = optional("source=hub or modelscope: branch, tag or commit")
    subset: Text | None = optional("source=hub or modelscope: configuration, if there are several")
    split: Text = optional("source=hub, modelscope or a saved folder: the split to read")
    paths: Annotated[list[PathText], Field(min_length=1)] | PathText = optional(
        "source=local: a file or folder, or a list of them"
    )
    columns: Columns = optional("")

    @model_validator(mode="after")
    def _has_its_keys(self) -> Self:
        here = {"repo", "revision", "subset", "split", "columns"} if self.name in ("hub", "modelscope") else set()
        if self.name == "local":
            here = {"paths", "split", "columns"}
        given = self.model_fields_set - {"name", "folder"}
        if missing := sorted(here - given):
            raise ValueError(f"{', '.join(missing)} is missing, which source={self.name} needs")
        if others := sorted(given - here):
            raise ValueError(f"source={self.name} has no {', '.join(others)}")
        return self


class Split(Closed):
    name: Text = Field(description="set by split=NAME")
    train: Rows = optional("recipes' splits: rows to train on")
    test: Rows = optional("recipes' splits: rows to test on")
    shuffle_seed: Annotated[Integer, Field(ge=0, lt=2**64)] | None = optional(
        "recipes' splits: shuffle the source first; null: do not"
    )


class Ood(Closed):
    names: Annotated[list[Text], List] = Field(description="which of ood.sets are written")
    size: Annotated[Integer, Field(ge=0, le=MAX_OOD)] = Field(description="problems in each")
    sets: dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], Shape] = Field(
        description="sets out of distribution: the keys of preset that differ"
    )

    @model_validator(mode="after")
    def _are_known(self) -> Self:
        if unknown := [name for name in self.names if name not in self.sets]:
            raise ValueError(f"names has {', '.join(unknown)}, and sets has {', '.join(self.sets) or 'nothing'}")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names has one of the sets twice")
        if self.names and not self.size:
            raise ValueError("size=0: each of the sets needs a problem")
        return self


class PrepareKeys(Closed):
    out: PathText = Field(description="folder to write; it is replaced as a whole")
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**64)] = Field(
        description="of generated problems, and of the order of rows"
    )
    train_size: Rows | UpTo | None = Field(
        description="training problems; null: all of that side; `up to N`: N, or all if they are fewer"
    )
    test_size: Rows | UpTo | None = Field(description="test problems, in the same way")
    held_out_share: Annotated[Number, Field(gt=0, lt=1)] = Field(
        description="split=by_numbers: share of number multisets that only the test side uses; the tiny base model "
        "was made with the default"
    )
    annotate: bool = Field(description="solve every problem: difficulty and solutions in extra_info and the datasheet")
    unsolvable: Literal["keep", "drop", "apart"] = Field(
        description="keep problems without a solution, leave them out, or write them to unsolvable.parquet"
    )
    max_rejected: Share = Field(description="share of the source's rows that may be rejected as no problems")
    tokenizer: PathText | None = Field(
        description="folder or name on the hub; the datasheet then reports prompt lengths in tokens"
    )
    max_prompt_length: Count | None = Field(description="the datasheet reports how many prompts have more tokens")
    engine: Literal["local", "ray"] = Field(description="this machine's cores, or Ray Data on RAY_ADDRESS's cluster")
    workers: Annotated[Count, Field(le=1024)] | None = Field(description="engine=local: processes; null: all cores")
    source: Source
    split: Split
    preset: Preset
    ood: Ood
    prompt: Prompt

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        missing = sorted({"train", "test", "shuffle_seed"} - self.split.model_fields_set)
        if self.split.name != "by_numbers" and missing:
            lacking = ", ".join(f"split.{key}" for key in missing)
            raise ValueError(f"split.name={self.split.name}: a split by place in the source needs {lacking} too")
        preset = self.preset.model_dump()
        _check_bounds(preset, "preset")
        for name in self.ood.names:
            _check_bounds(preset | self.ood.sets[name].model_dump(exclude_unset=True), f"ood.sets.{name}")
        if self.unsolvable != "keep" and not self.annotate:
            raise ValueError(f"unsolvable={self.unsolvable} needs the solver: annotate=true")
        if self.split.name != "by_numbers" and self.split.shuffle_seed is not None and self.seed < 0:
            raise ValueError(f"seed={self.seed}: split={self.split.name} needs a seed of 0 or more")
        if self.max_prompt_length and not self.tokenizer:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} needs tokenizer=PATH, whose tokens are counted"
            )
        return self


class RenderKeys(Closed):
    tokenizer: PathText = Field(description="a model's folder, or its name on the hub")
    numbers: Annotated[list[Numbers], List, Field(min_length=2, max_length=MAX_COUNT)] = Field(
        description="of the problem to show"
    )
    target: Target = Field(description="of the problem to show")
    prompt: Prompt


class Proportions(Closed):
    """Shares of which only the proportions count."""

    @model_validator(mode="after")
    def _some_is_wanted(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("one of the shares should be greater than 0")
        return self


class Styles(Proportions):
    first_try: Share = Field(description="share of traces that go straight to a solution")
    search: Share = Field(description="share that try whole candidates, one after another")
    search_with_backtracking: Share = Field(description="share that take a step, look on, and go back")


class TracesKeys(Closed):
    data: PathText = Field(description="a folder that python -m data_prep wrote; its train.parquet is read")
    out: PathText = Field(description="folder to write; it is replaced as a whole")
    count: Rows | None = Field(
        description="traces to write; more than the problems: several different ones for a problem; null: one for each"
    )
    styles: Styles
    stop: Annotated[Number, Field(gt=0, le=1)] = Field(
        description="probability that a wrong try is the last one before the solution"
    )
    most: Annotated[Count, Field(le=100)] = Field(description="the most wrong tries in a trace")
    language: Literal["en", "zh"] = Field(description="of the words")
    tokenizer: PathText | None = Field(
        description="a model's folder, or its name on the hub; the manifest then reports lengths in tokens"
    )
    max_tokens: Count | None = Field(
        description="the most tokens of a response, its end token included; null: any; needs tokenizer"
    )
    held_out_share: Annotated[Number, Field(ge=0, lt=1)] = Field(
        description="share of number multisets whose traces go to held_out.parquet"
    )
    seed: Seed = Field(description="of all choices; each row has its own random numbers")
    workers: Annotated[Count, Field(le=1024)] | None = Field(description="processes; null: all cores")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.max_tokens and not self.tokenizer:
            raise ValueError(f"max_tokens={self.max_tokens} needs tokenizer=PATH, whose tokens are counted")
        return self
