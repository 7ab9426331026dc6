"""What people do with a trained model: retrieval scores, zero-shot classification, a look at its feature space."""
