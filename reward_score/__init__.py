"""Verdicts on responses. Standard library only: neither torch nor verl, so that anyone can copy it.

grammar.py      what counts as an answer, whether it is an expression, and what it is worth
components.py   what else a response may be paid for
profiles.py     named weighted sums of components, the published recipes' among them
countdown.py    `compute_score`, as verl calls it
random_control.py   the control: a coin as the reward
bench.py        responses to the frozen test set as a table
figures.py      pass@k, and the interval of a share
__main__.py     the same on the command line, with an explanation
"""
