"""What touches verl: training, its CPU platform, evaluation and reports."""

import data_prep  # noqa: F401  it says in one line if the packages are missing
