"""One run from outside: its folder, what is checked before it starts, the process that verl runs in, and its progress.

Imports settings/, measure/ and planning/, data_prep and reward_score; neither torch nor verl, so that a command starts
in a second.
"""
