"""Parts of `benchmarks/ppo_throughput.py`: fixtures, the two sides, what they record, and the tables."""
