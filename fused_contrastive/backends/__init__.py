"""Implementations of the primitives. They know nothing about losses and never import each other."""
