"""Small experiments on top of `nano_asymflow.py`, one question each: `python -m toy.rank_sweep --quick`."""
