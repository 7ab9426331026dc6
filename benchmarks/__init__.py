"""The benchmarks: which losses at which sizes, whose implementations, how they are timed, and the report."""
