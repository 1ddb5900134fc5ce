"""Inner loops in C for the CPU, compiled where they are first used; torch's operations do the same without them."""
