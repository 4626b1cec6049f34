"""Benchmarks: `python -m asymflow.bench`. docs/benchmarks.md says what each of them measures, and what came out."""
