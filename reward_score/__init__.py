"""Verdicts on responses. Standard library only: neither torch nor verl, so that anyone can copy it."""
