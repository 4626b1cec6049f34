"""The benchmark: `python -m asymflow.bench`. docs/benchmarks.md says what it checks and measures, and has results."""
