"""What all other layers build on: the description of a problem, input checks, the memory budget, modes and forks."""
