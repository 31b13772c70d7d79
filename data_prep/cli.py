"""What all commands of this project share: Hydra composes, a schema checks, and a user's mistake is one line.

A command is a function of a checked configuration:

    class Keys(Checked):
        n: Count = Field(description="samples a problem")

    @command("evaluate", Keys)
    def main(cfg): ...

    if __name__ == "__main__":
        main()

Defaults are in configs/. Types, ranges and descriptions are in the schema. `--help` shows both.
"""

import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data_prep.help import CONFIGS as CONFIGS
from data_prep.help import complete, did_you_mean, help_text, of_key

if TYPE_CHECKING:
    from omegaconf import DictConfig

ENVIRONMENT = (  # errors of the machine, which become one line
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
NO_KEY = "Could not override '(.*)'"  # what Hydra says of a key that is not there
_OWN: list[str] = []  # the folders of --config-dir
HELP = ("--help", "-h")
OPTIONS = ("--help", "--version", "--cfg job", "--config-dir")


class UserError(SystemExit):
    """A mistake of the user's: the message says what is wrong, where, and what to do. Uncaught, it ends the program."""

    def __init__(self, message: str) -> None:
        self.message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)  # one line
        super().__init__(f"error: {self.message}")

    def __reduce__(self) -> tuple[type, tuple[str]]:  # so that a worker process can pass it on
        return type(self), (self.message,)


def as_list(value: Any) -> list[Any]:
    """The value of a key that takes one text, a list of them, or null."""
    return [value] if isinstance(value, str) else list(value or [])


def _no_bool(value: Any) -> Any:
    """pydantic would read true as 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _expanded(path: str) -> str:
    """A path with its `~` expanded, because a shell does not expand it behind `KEY=`."""
    if (expanded := os.path.expanduser(path)).startswith("~"):
        raise ValueError("names an unknown home folder; a folder of that name is ./~NAME")
    if not os.path.exists(expanded) and os.path.exists(os.path.realpath(expanded)):  # it would seem to be a new one
        raise ValueError("names an existing folder by way of one that does not exist")
    return expanded


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Integer, Field(ge=1)]
Size = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, Field(ge=0, lt=2**31)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(_expanded)]


class Checked(BaseModel):
    """Keys of a configuration. Other keys are not checked."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, protected_namespaces=())


def _messages(errors: Sequence[Any], values: Any) -> str:
    """pydantic's errors as one line, with a clause for each key, which may have several errors."""
    found: dict[str, list[str]] = {}
    for error in errors:
        key, node, named = [], values, error["type"] == "missing"
        for part in error["loc"]:  # it holds keys, but also the names of types that were tried
            if (
                named
                or (isinstance(node, dict) and part in node)
                or (isinstance(node, list) and part in range(len(node)))
            ):
                node = None if named else node[part]
                key.append(_shown(part))
        what = re.sub(r"^(Value error, |(Input|List|String) (?=should))", "", error["msg"])
        if error["type"] == "extra_forbidden":
            what = "there is no such key"
        nested = isinstance(node, dict) or (isinstance(node, list) and any(isinstance(each, dict) for each in node))
        found.setdefault(".".join(key) + ("" if named or nested else f"={_shown(node)}"), []).append(what)
    return "; ".join(
        f"{key}= is missing" if "Field required" in ways else f"{key}: {' or '.join(dict.fromkeys(ways))}".lstrip(": ")
        for key, ways in found.items()
    )


def _shown(value: Any) -> str:
    """A value on one line."""
    text = "null" if value is None else str(value) if str(value).isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _update(node: Any, values: dict[str, Any]) -> None:
    """Write checked values back into the configuration, so that for every reader `no` is False."""
    from omegaconf import OmegaConf

    for key, value in values.items():
        now = node[key]
        if isinstance(value, dict):
            _update(now, value)
        elif repr(OmegaConf.to_container(now, resolve=True) if OmegaConf.is_config(now) else now) != repr(value):
            node[key] = value


def _given(node: Any) -> Any:
    """A configuration without the values that are missing (`???`) or not resolved (`${...}`)."""
    if not isinstance(node, dict):
        return node
    return {
        key: _given(value)
        for key, value in node.items()
        if not (isinstance(value, str) and (value == "???" or "${" in value))
    }


def check(cfg: "DictConfig", keys: type[Checked]) -> None:
    """Check the keys of a composed configuration and convert their values in it, as YAML reads them.

    Raises:
        UserError: a value is missing, has the wrong type or is out of its range.
    """
    from omegaconf import OmegaConf, flag_override
    from omegaconf.errors import OmegaConfBaseException

    unresolved = None
    try:
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # often because of a value that the schema refuses
        container, unresolved = OmegaConf.to_container(cfg), error
    given = _given(container)
    try:
        values = keys.model_validate(given)
    except ValidationError as error:
        wrong = [each for each in error.errors(include_url=False) if not (unresolved and each["type"] == "missing")]
        if wrong or not unresolved:
            raise UserError(_messages(wrong, given)) from None
    if unresolved:
        raise unresolved
    with flag_override(cfg, "struct", False):
        _update(cfg, values.model_dump(exclude_unset=True))


def compose(
    config: str, overrides: Sequence[str], keys: type[Checked] | None = None, folder: Path = CONFIGS
) -> "DictConfig":
    """Compose a command's configuration, and check it if there are `keys`.

    hydra.main would compose it twice, the first time only to read `hydra.mode`: half a second for verl's.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig, OmegaConf

    GlobalHydra.instance().clear()
    with in_one_line(), hydra.initialize_config_dir(str(folder), version_base="1.3"):
        if nulls := [overridden_key(each) for each in overrides if each.endswith("=null")]:
            whole = hydra.compose(config, [each for each in overrides if not each.endswith("=null")])
            if sections := [key for key in nulls if isinstance(OmegaConf.select(whole, key), DictConfig)]:
                raise UserError(f"{sections[0]}=null: it is a section of settings; set its keys, or leave it out")
        cfg = hydra.compose(config, list(overrides))
        if keys:
            check(cfg, keys)
    return cfg


@contextmanager
def in_one_line() -> Iterator[None]:
    """Errors of Hydra and of the machine become a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise UserError(_of_the_machine(error)) from None
        if _is_from_hydra(error):
            raise UserError(_refusal(error)) from None
        raise


def same_command() -> str:
    """The command that goes on, in words: fresh=true would delete what it is to go on from."""
    return "the same command" + (" without fresh=true" if "fresh=true" in sys.argv else "")


def _of_the_machine(error: OSError) -> str:
    """An error of the machine as one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space, and {same_command()} goes on"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error).splitlines()[0]


def _is_from_hydra(error: Exception) -> bool:
    """Whether the error comes from Hydra, OmegaConf or YAML, by its type or by where it was raised."""
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [each for each in frames if each != "codecs"]  # its errors belong to the reader that called it
    return any(each.startswith(("hydra.", "omegaconf.", "yaml.")) for each in (type(error).__module__, *frames[-1:]))


def quoted(value: object) -> str:
    """A text as a value of Hydra's grammar, whatever characters it holds.

    >>> quoted('a "b" = c')
    '"a \\\\"b\\\\" = c"'
    """
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), str(value)) + '"'


def _refusal(error: Exception) -> str:
    """An error of Hydra or OmegaConf as one line."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError
    from yaml import MarkedYAMLError

    if isinstance(error, UnicodeDecodeError):
        return "a file of the configuration is not in UTF-8; save it as UTF-8"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return f"{mark.name}, line {mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if value.startswith("[") and "]" not in value:  # the shell has cut it at a space
            return f"{error.override!r} cannot be read; write a list without spaces, such as {key}=[0,1]"
        advice = f"quote its value: {shlex.quote(f'{key}={quoted(value)}')}" if equals else "KEY=VALUE is expected"
        return f"{error.override!r} cannot be read; {advice}"
    lines = [str(each).strip().splitlines()[0] for each in (error, error.__cause__) if str(each or "").strip()]
    if sweep := re.match("Ambiguous value for argument '(.*?)=(.*)'", lines[0]):
        return f"'{sweep[1]}={sweep[2]}' is ambiguous; a list is written {sweep[1]}=[{sweep[2]}]"
    if isinstance(error, MissingConfigException) and error.options:
        lines.append(f"(known: {', '.join(error.options)})")
        group, _, option = str(error.missing_cfg_file).partition("/")
        path = f"; a folder or a hub's name: model=local actor_rollout_ref.model.path={option}"
        of_path = group == "model" and "/" in option and "'train'" in lines[0]
        lines.append(path if of_path else did_you_mean(option, error.options, f"{group}="))
    cause, given = error.__cause__, re.match(NO_KEY, lines[0])
    if given and isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return of_key(given[1], str(cause.full_key), cause.parent_node)
    if given and "No match in the defaults list" in lines[0]:  # a group of other commands
        return f"{given[1]}= is no key or group of this command; --help shows those that it has"
    return " ".join(filter(None, dict.fromkeys(lines))).replace(" ;", ";")


def _set_own_folders(folders: Sequence[str]) -> None:
    """Let Hydra also find configurations in these folders of the user's, and in no others of an earlier command."""
    for folder in folders:
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
        for file in Path(folder).rglob("*.yaml"):
            if (CONFIGS / file.relative_to(folder)).is_file():
                raise UserError(f"{file} has the name of a shipped file, which would be taken instead: rename it")
    _OWN[:] = folders
    if folders:
        _register_own_folders()


@cache
def _register_own_folders() -> None:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OwnConfigurations(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in _OWN:
                search_path.append("--config-dir", f"file://{Path(folder).resolve()}")

    Plugins.instance().register(OwnConfigurations)


def split_options(arguments: Sequence[str], keys: Iterable[str] = ()) -> tuple[list[str], list[str], bool]:
    """The overrides of a command line, the folders of its `--config-dir FOLDER`, and whether it has `--cfg job`.

    That is Hydra's, and asks to print the configuration and to do nothing.

    Args:
        keys: of the command, for advice on an option that is meant as a key.
    """
    overrides, folders, shown, given = [], [], False, iter(arguments)
    for each in given:
        option, _, value = each.partition("=")
        if option == "--config-dir":
            folders.append(value or next(given, ""))
        elif option == "--cfg":
            if (what := value or next(given, "")) != "job":
                raise UserError(f"--cfg {what}: write `--cfg job`, which prints the configuration and starts nothing")
            shown = True
        elif each.startswith("-"):
            advice = did_you_mean(option, OPTIONS) or did_you_mean(option.lstrip("-").replace("-", "_"), keys, end="=")
            raise UserError(f"there is no option {option}; KEY=VALUE and {', '.join(OPTIONS)} are possible{advice}")
        else:
            overrides.append(each)
    return overrides, folders, shown


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The overrides of a command line; Hydra finds configurations in the folders of its `--config-dir` from here on."""
    overrides, folders, _ = split_options(arguments)
    _set_own_folders(folders)
    return overrides


def overridden_key(override: str) -> str:
    """The key of an override, such as `seed` of `+seed=1`."""
    return override.lstrip("+~").partition("=")[0]


def refuse(overrides: Iterable[str], keys: Iterable[str], advice: str) -> None:
    """Raise UserError if an override sets one of these keys, which the command sets itself."""
    if taken := set(map(overridden_key, overrides)) & set(keys):
        raise UserError(f"{min(taken)}= is set by this command; {advice}")


@contextmanager
def _misspelt(overrides: Sequence[str], keys: type[Checked]) -> Iterator[None]:
    """If training does not know one of these overrides, or a key is missing: perhaps one of its own keys was meant."""
    try:
        yield
    except UserError as error:
        for key in map(overridden_key, overrides):
            unknown = f"no key {key!r}" in str(error) or "= is missing" in str(error)
            if unknown and (advice := did_you_mean(key, keys.model_fields, end="=")):
                raise UserError(f"there is no key {key!r}{advice}") from None
        raise


@contextmanager
def until_closed() -> Iterator[None]:
    """Printing may end early: `| head` has read enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(cfg: "DictConfig") -> None:
    from omegaconf import OmegaConf

    with until_closed():
        print(OmegaConf.to_yaml(cfg), end="")


def print_version() -> None:
    try:
        print(version("countdown-zero"))
    except PackageNotFoundError:
        raise UserError(
            "countdown-zero is not installed here; `pip install --no-deps -e .` in its folder does"
        ) from None


def _named(overrides: Sequence[str], key: str) -> list[str]:
    """The overrides with `KEY=[...]` instead of the folders among them, whose names may contain any characters."""
    rest = [each for each in overrides if "=" in each and not Path(each).is_dir()]
    folders = (quoted(each.replace("${", r"\${")) for each in overrides if each not in rest)
    return [*rest, *([f"{key}=[{','.join(folders)}]"] if len(rest) < len(overrides) else [])]


def command(
    config: str, keys: type[Checked], folder: Path = CONFIGS, others: str | None = None, positional: str | None = None
) -> Callable[[Callable[[Any], object]], Callable[[], None]]:
    """Make a command of `main(cfg)`: it composes the configuration with the command line and checks it.

    Args:
        config: the name of the configuration in `folder`.
        keys: the schema of this project's own keys.
        folder: the folder of the configuration.
        others: a key whose list gets the overrides of keys that are not in `keys`.
        positional: a key whose list gets the folders that are named without a key.
    """

    def decorate(main: Callable[[Any], object]) -> Callable[[], None]:
        @wraps(main)
        @in_one_line()
        def entry() -> None:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.reconfigure(errors="backslashreplace")
            if sys.getfilesystemencoding() != "utf-8" and not "".join([*sys.argv, os.getcwd()]).isascii():
                # verl's processes use UTF-8 (run/start.py), and would take such a name for another folder's.
                raise UserError("a name that is not ASCII needs a locale with UTF-8: set LC_ALL=C.UTF-8")
            if any("\ud800" <= letter <= "\udfff" for argument in sys.argv for letter in argument):
                raise UserError("an argument is not in UTF-8: give the file or folder a name that is")
            arguments = sys.argv[1:]
            try:
                if set(HELP) & set(arguments):
                    with until_closed():
                        print(help_text(sys.modules["__main__"].__doc__ or "", config, keys, folder, bool(others)))
                    return
                if "--version" in arguments:
                    print_version()
                    return
                if arguments[:1] == ["-sc"]:
                    complete(arguments[-1], {config: folder} | ({"train": CONFIGS} if others else {}))
                    return
                given, own, shown = split_options(arguments, keys.model_fields)
                if positional:
                    given = _named(given, positional)
                # A command of another folder has keys with the name of a group, such as play's prompt=.
                _set_own_folders(own if folder == CONFIGS else [])
                rest = [each for each in given if others and overridden_key(each) not in keys.model_fields]
                cfg = compose(config, [each for each in given if each not in rest], folder=folder)
                with _misspelt(rest, keys), in_one_line():
                    _set_own_folders(own)
                    if others:
                        cfg[others] = [*cfg[others], *rest]
                    check(cfg, keys)
                    if shown:
                        show(cfg)
                    else:
                        main(cfg)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(130)

        return entry

    return decorate
