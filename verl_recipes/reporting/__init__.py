"""The page and the picture of a run, made from its folder.

Imports run/, measure/ and settings/, data_prep and reward_score.
"""
