"""The primitives: the operators' schemas, the choice of a backend, the autograd formulas, and the public functions."""
