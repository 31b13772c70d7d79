"""What responses show about a model: problems, figures with intervals, two evaluations compared, behaviours.

Pure functions of samples. Imports data_prep and reward_score, and no other package of this one.
"""
