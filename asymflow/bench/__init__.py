"""Benchmarks: `python -m asymflow.bench`. docs/benchmarks.md says what each measures, and has the results."""
