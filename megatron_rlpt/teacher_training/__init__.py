"""Data to train the teacher on: prompts of its roles with known right answers, from any documents.

In reading order:

- ``corpus.py``: documents apart from the policy's own, split by document.
- ``judge_examples.py``: pairs and texts with known verdicts, as the judge's prompts.
- ``build.py``: ``rlpt teacher data``, from documents to ``train.jsonl``, ``heldout.jsonl`` and ``card.json``.
"""
