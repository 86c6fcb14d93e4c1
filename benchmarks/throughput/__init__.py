"""Holds what the benchmarks of throughput share: fixtures, the two sides, what they record, and the tables."""
