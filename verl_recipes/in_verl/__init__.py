"""What runs inside verl's processes on any device: the replay buffer, the alarms, the agent loop of an evaluation.

verl loads it by the names in configs/. Imports run/, measure/ and settings/, data_prep and reward_score.
"""
