"""What a command tells a person who asks or errs: `--help`, "did you mean", and the shell's completion."""

import difflib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from data_prep import SHIPPED

SHELLS = ("bash", "fish", "zsh")  # that Hydra knows
CONFIGS = SHIPPED / "configs"
OF_TRAINING = "Keys and groups of training, too: python -m verl_recipes.train --help"
OF_VERL = "Every other key is verl's: `--cfg job` prints all keys with their values, and starts nothing."
OWN = """\
Your own recipe, prompt, model ... is a file: my/recipe/mine.yaml is taken by `--config-dir my recipe=mine`.
`--version` prints the version. Completion by the Tab key: eval "$(countdown-zero -sc install=bash)\""""


def did_you_mean(word: str, known: Iterable[str], start: str = "", end: str = "") -> str:
    """A question that names the known words of which this one is a part or the initials; else the nearest; or nothing.

    >>> did_you_mean("recpie", ["recipe", "model"], end="=")
    '; did you mean recipe=?'
    """
    names = list(known)
    parts = {name: name.split("_") for name in names}
    near = [name for name, of in parts.items() if word in of or (len(of) > 1 and word == "".join(x[:1] for x in of))]
    near = near or difflib.get_close_matches(word, names, 1, 0.7)
    return f"; did you mean {' or '.join(f'{start}{name}{end}' for name in near[:3])}?" if near else ""


def of_key(key: str, missing: str, parent: Any) -> str:
    """What to say of a key that a configuration does not have.

    Args:
        key: as it was given.
        missing: the part of it that is not there, with the parts before.
        parent: the node where the last of these parts was looked for.
    """
    from omegaconf import OmegaConf

    *before, part = missing.split(".")
    groups = {each.name for each in CONFIGS.iterdir() if each.is_dir()}
    start, rest = "".join(f"{each}." for each in before), key.removeprefix(missing)
    keys = [each for each in _dotted(OmegaConf.to_container(parent._get_root())) if not each.startswith("hydra.")]
    near = [name for name in map(str, parent) if f"{start}{name}{rest}" in keys]  # the whole key must be there
    advice = did_you_mean(part, [*near, *([] if before or rest else sorted(groups - {part}))], start, f"{rest}=")
    of_group = key.split(".")[0] in groups
    if not advice:  # a key of some depth without its beginning, or behind the name of a group
        last = key.split(".")[-1] if of_group else key
        found = [each for each in keys if each.endswith(f".{key}") or f"_{key}_" in f"_{each.split('.')[-1]}_"] or [
            each for each in keys if f".{each}".endswith(f".{last}")
        ]
        deep = sorted(found, key=lambda each: (each.count("."), len(each)))[:3]
        advice = f"; did you mean {' or '.join(f'{each}=' for each in deep)}?" if deep else ""
    verls = "trainer" in keys  # whatever is added is for verl
    adds = "" if not before and (of_group or not verls) else f", and +{key}= adds it"
    return f"there is no key {key!r}" + (advice or f"; --help shows the keys{adds}")


def _dotted(node: Any, before: str = "") -> Iterator[str]:
    """All keys of a configuration, with those that they are in."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{before}{key}"
        yield from _dotted(value, f"{before}{key}.")


def complete(request: str, configurations: Mapping[str, Path]) -> None:
    """Print what Hydra's completion has for the line in COMP_LINE.

    Args:
        request: query=SHELL, as Hydra's shell function asks.
        configurations: the command's, and the folder of each.
    """
    import hydra
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    action, _, shell = request.partition("=")
    if shell not in SHELLS or action not in ("install", "uninstall", "query"):
        raise SystemExit(f"error: -sc {request}: install=SHELL is expected, with SHELL one of {', '.join(SHELLS)}")
    for config, folder in configurations.items():
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            plugins = Hydra.get_shell_to_plugin_map(GlobalHydra.instance().config_loader())[shell]
            for plugin in plugins:
                getattr(plugin, action)(*[config][: action == "query"])


def _type_name(annotation: Any) -> str:
    """The name of a field's type, as `--help` shows it."""
    names = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
    if annotation in names:
        return names[annotation]
    parts = get_args(annotation)
    if str(annotation).startswith("typing.Literal"):
        return " | ".join(map(str, parts))
    if getattr(annotation, "__metadata__", None):
        return _type_name(parts[0])
    if getattr(annotation, "__origin__", None) in (list, dict):
        return f"{annotation.__origin__.__name__} of {_type_name(parts[-1])}"
    return " or ".join(dict.fromkeys(_type_name(part) for part in parts)) if parts else "mapping"


def _described(keys: type[BaseModel], defaults: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of each key."""
    from omegaconf import OmegaConf

    for name, field in keys.model_fields.items():
        key, kind = f"{prefix}{field.alias or name}", field.annotation
        node = defaults._get_node(field.alias or name, validate_access=False) if defaults is not None else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _described(kind, node, f"{key}.")
            continue
        raw = OmegaConf.to_container(node) if OmegaConf.is_config(node) else getattr(node, "_value", lambda: None)()
        default = "" if node is None else "required" if raw == "???" else str(raw)
        default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        yield key, _type_name(kind), textwrap.shorten(default, 60, placeholder=" ..."), field.description or ""


def help_text(document: str, config: str, keys: type[BaseModel], folder: Path, training: bool) -> str:
    """What `--help` prints: the command's docstring, its keys with meaning, type and default, and its groups.

    Args:
        training: whether the keys of training can be added.
    """
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        defaults = hydra.compose(config, return_hydra_config=True)
    # The groups that the file names, in its order; Hydra leaves out those with several options.
    first: dict[str, Any] = {}
    file: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{config}.yaml"))
    for each in file.get("defaults", []):
        first |= each if isinstance(each, dict) else {}
    found = {group: now for group, now in defaults.hydra.runtime.choices.items() if "hydra/" not in group}
    choices = {group: " ".join(now) if isinstance(now, list) else now for group, now in first.items()} | found
    groups = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in choices}
    lines = [document.strip(), "", "Keys (KEY=VALUE):"]
    rows = list(_described(keys, defaults))
    width = max((len(key) for key, *_ in rows), default=0)
    for key, kind, default, text in rows:
        shown = f"{text} ({'; '.join(each for each in (kind, default) if each)})".strip()
        lines += textwrap.wrap(shown, 120, initial_indent=f"  {key:{width}}  ", subsequent_indent=" " * (width + 4))
    if any(groups.values()):
        lines += ["", "Groups (GROUP=OPTION, * is the default):"]
    for group, names in groups.items():
        if names:
            marked = ", ".join(f"{name}*" if name in str(choices[group]).split() else name for name in names)
            lines += textwrap.wrap(
                marked, 120, initial_indent=f"  {group:{width}}  ", subsequent_indent=" " * (width + 4)
            )
    of_verl = [OF_TRAINING] * training or [OF_VERL] * (config == "train")
    return "\n".join([*lines, "", *of_verl, OWN])
