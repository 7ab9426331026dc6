"""The oracle, seeded inputs and the error budget that the tests and the verifier share."""
