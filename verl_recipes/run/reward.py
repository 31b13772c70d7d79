"""Checks of the reward function before a run starts: verl can load it, and it takes the configured options."""

import importlib
import importlib.util
import inspect
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.cli import UserError

KEY = "reward.custom_reward_function"
# verl 0.9.1 still has these sections, and its trainer reads none of them; some keys have another name now.
FORMER = ("custom_reward_function", "reward_model", "sandbox_fusion")
RENAMED = {
    "reward_model.num_workers": "num_workers",
    "reward_model.reward_manager": "reward_manager.name",
    "reward_model.reward_loop_source": "reward_manager.source",
    "reward_model.reward_loop_module_path": "reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward_manager.module.name",
}
VERLS = ("data_source", "solution_str", "ground_truth", "extra_info")  # the keywords that verl's managers pass


def load_module(path: str) -> ModuleType:
    """The module at a path as verl's `load_module` reads it: pkg://package.module, file://path, or a path."""
    if path.startswith("pkg://"):
        return importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    spec = importlib.util.spec_from_file_location("reward_function", path.removeprefix("file://"))
    if spec is None or spec.loader is None:
        raise ImportError("no Python file; its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_reward(cfg: DictConfig) -> None:
    """Raise UserError if the reward function cannot be loaded or called with its options.

    If its module has a `check_options`, as those of reward_score do, that function may refuse the options too.
    """
    for key in (f"{name}.{last}" for name in FORMER for last in cfg.get(name) or {}):
        if not isinstance(value := OmegaConf.select(cfg, key), DictConfig | None):
            raise UserError(f"{key}={value}: verl 0.9.1 does not read it; write reward.{RENAMED.get(key, key)}=")
    function = cfg.reward.custom_reward_function
    if not function.path:  # verl then chooses one of its own by `data_source`
        return
    try:
        module = load_module(function.path)
    except Exception as error:  # the user's file may raise anything
        raise UserError(f"{KEY}.path={function.path} cannot be loaded: {type(error).__name__}: {error}") from None
    score = getattr(module, str(function.name), None)
    if not callable(score):
        raise UserError(f"{KEY}.name={function.name}: {function.path} has no such function; name one of that file")
    options: Any = OmegaConf.to_container(function, resolve=True).get("reward_kwargs", {})  # type: ignore[union-attr]
    if not isinstance(options, dict):
        raise UserError(
            f"{KEY}.reward_kwargs={options} is no mapping of options; to pass none, add ~{KEY}.reward_kwargs"
        )
    try:
        inspect.signature(score).bind(**dict.fromkeys(VERLS), **options)
        if check := getattr(module, "check_options", None):
            check(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{KEY}.reward_kwargs: {error}") from None
