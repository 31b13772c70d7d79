"""What touches verl: training, its CPU platform, evaluation and reports."""

import sys

if not {"verl_recipes.doctor", "verl_recipes.run.machine"} & {*getattr(sys, "orig_argv", [])}:  # these need no packages
    import data_prep  # noqa: F401  it says in one line if the packages are missing
