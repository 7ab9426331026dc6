"""The losses: vector arithmetic on the primitive's statistics, as functions and thin modules."""
