"""What the commands share that make the base models of this project: tokenizer, untrained model, folder.

Imports data_prep alone.
"""
