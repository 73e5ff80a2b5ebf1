"""Test-time adaptation: a trained set of heads and a handful of labels -> one function, and what it cost."""
