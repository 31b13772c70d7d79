"""A number that the CPU engine and the plan share; it imports nothing, as every process of verl's loads it."""

MICRO_BATCH = (
    32  # sequences of a micro-batch on a CPU: larger ones do not run faster on two cores, and hold more padding
)
