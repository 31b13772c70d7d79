"""The page and the picture of a run, made from its folder.

Imports run/ and measure/, data_prep and reward_score.
"""
