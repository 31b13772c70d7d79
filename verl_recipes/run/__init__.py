"""One run from outside: its folder, what is checked before it starts, the process that verl runs in, and its progress.

Imports settings/ and measure/, data_prep and reward_score; neither torch nor verl: a command starts in a second.
"""
