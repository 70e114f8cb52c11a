"""Published formats of prompts and questions, and records of the user's own.

In reading order:

- ``registry.py``: every format by name, and ``load``: read a set and keep what the configuration asks for.
- ``records.py``: records of JSON Lines, JSON, CSV and Parquet files; errors that name the record.
- ``jsonl.py``: the user's own prompts and questions.
- ``real_toxicity_prompts.py``, ``toxigen.py``, ``xstest.py``: safety.
- ``halueval.py``, ``factscore.py``, ``truthfulqa.py``: factuality.
"""

from megatron_rlpt.evaluation.formats.registry import FORMATS, load

__all__ = ["FORMATS", "load"]
