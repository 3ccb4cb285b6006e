"""The benchmarks: their data, and how they are asked."""
