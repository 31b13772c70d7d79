"""How the base models are made that come with this project: a tokenizer, an untrained Qwen2, supervised training.

Imports data_prep alone.
"""
