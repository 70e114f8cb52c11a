"""Evaluation: compare models with a reference, by judges that trained them and by others, with certain intervals.

In reading order:

- ``evaluate.py``: the command, from models and prompts to ``evaluation.json``.
- ``models.py``: what a path holds; ``prompt_sets.py``: prompts and questions; ``formats/``: published ones.
- ``engines.py``, ``generation.py``: continuations, generated once and kept by content.
- ``measures.py``: columns of what judges and counts say; ``estimates.py``: results with intervals.
- ``judges.py``, ``verdicts.py``, ``verdict_cache.py``, ``in_sample.py``: named judges and their stored verdicts.
- ``second_measure.py``, ``ngram_model.py``: the second measure.
- ``likelihood.py``: perplexity and multiple choice; ``text_metrics.py``: diversity.
- ``statistics.py``, ``agreement.py``: intervals that resample prompts; agreement of judges.
- ``hygiene.py``: prompts that are in training text, or in each other.
- ``labelled_pairs.py``, ``calibration.py``: the accuracy of a judge.
- ``results.py``: the content of ``evaluation.json``; ``example_texts.py``, ``provenance.py``: parts of it.
"""
