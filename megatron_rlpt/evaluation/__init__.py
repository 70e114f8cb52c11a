"""Evaluation: measure how much better the trained policy is than its starting model, and how certain that is.

In reading order:

- ``evaluate.py``: the command: generate with every policy, judge, compare, report.
- ``compare.py``: which continuations are compared with which, without running a model; the protocols of scorers.
- ``statistics.py``: win rates with confidence intervals that resample prefixes.
- ``text_metrics.py``: length, repetition and diversity of continuations.
- ``judge_scorer.py``: scores continuations with a judge, in groups of one prefix.
- ``second_measure.py``: build the measure that took no part in training, built in or the user's, and fit it.
- ``ngram_model.py``: the built-in second measure, a Kneser-Ney n-gram model.
- ``report.py``: collects ``report.json``.
- ``render.py``: shows a report in a terminal and as ``report.html`` (template ``report.html``).
- ``plots.py``: plots of the page as inline SVG.
"""
