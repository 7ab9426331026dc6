"""The registry of losses, seeded cases and the harness that the tests and the verifier share."""
