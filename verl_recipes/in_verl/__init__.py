"""What runs inside verl's processes on any device: the replay buffer, the alarms, the agent loop of an evaluation.

verl loads it by the names in configs/. Imports run/ and measure/, and reward_score.
"""
