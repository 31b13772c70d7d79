"""Memory, disk and time of a run, before it starts.

Imports settings/ and data_prep. Functions that track memory import torch and transformers.
"""
