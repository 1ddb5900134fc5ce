"""Until when a map is iterated: evaluations, the stopping rule, and the figures of every sample."""
