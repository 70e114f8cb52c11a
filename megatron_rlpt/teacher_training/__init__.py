"""Data to train the teacher on: prompts of its roles with known right answers, from any documents.

In reading order:

- ``corpus.py``: documents apart from the policy's own, split by document.
- ``request.py``: what the command is asked for.
- ``material.py``: pairs of good and spoiled suffixes, and texts with a verdict.
- ``teacher_answers.py``: those of them that a model behind servers spoils, or votes on.
- ``sampled.py``: those that the policy writes itself.
- ``judge_examples.py``, ``rewriter_examples.py``: prompts of either role with right answers (``labelled_prompt.py``).
- ``build.py``: ``rlpt teacher data``, from documents to ``train.jsonl``, ``heldout.jsonl`` and ``card.json``.
- ``thoughts.py``, ``thinking_examples.py``, ``thinking_data.py``: ``rlpt teacher thoughts``, prompts to think before a
  continuation (experimental).
"""
