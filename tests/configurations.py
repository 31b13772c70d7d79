"""The shipped configurations as Hydra composes them, each only once: with verl's own that takes most of a second."""

import pickle
from functools import cache

import hydra

import verl_recipes.settings.configuration  # noqa: F401  registers the resolvers
from data_prep.cli import CONFIGS


def options(group):
    """The names of a group's options."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@cache
def composed(name, *overrides):
    """Pickled, which is copied faster than by copy.deepcopy."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return pickle.dumps(hydra.compose(name, overrides=list(overrides)))


def compose(name, *overrides):
    """A command's configuration, to be changed as one likes."""
    return pickle.loads(composed(name, *overrides))
