"""Evaluation of a trained model: retrieval scores, zero-shot classification, diagnosis of its feature space."""
