"""Memory, disk and time of a run before it starts.

Imports settings/ and data_prep; torch and transformers where the memory is tracked.
"""
