"""Evaluation sets kept out of a corpus: `items.py` reads the sets, `match.py` finds them in documents."""
