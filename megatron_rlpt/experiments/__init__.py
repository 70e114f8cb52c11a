"""Experiments: many runs that differ in a few options, over several seeds, and what follows from them.

In reading order: ``spec.py`` (the file of an experiment), ``run.py`` (train and measure every row and seed, or go on),
``measure.py`` (what one policy is like, prefix by prefix), ``claims.py`` (intervals over seeds and prefixes, and
whether an ordering holds), ``table.py`` (tables beside the paper's).
"""
