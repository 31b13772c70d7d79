"""Countdown problems as parquet in verl's format. Knows nothing of torch or verl."""
