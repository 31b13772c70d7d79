"""A number that the CPU engine and the plan share. It imports nothing, because every process of verl's loads it."""

MICRO_BATCH = 32  # sequences of a micro-batch on a CPU: more would not be faster on two cores, but hold more padding
