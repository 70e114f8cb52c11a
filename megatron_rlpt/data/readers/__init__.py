"""Readers of corpora.

In reading order:

- ``documents.py``: documents, malformed records, and the base class of readers.
- ``sources.py``: open the reader of a configured source.
- ``listing.py``: regular files below a folder or behind a glob.
- ``files.py``: the files of a source and their format.
- ``compression.py``: files as decompressed streams.
- ``jsonl.py``, ``json_values.py``: JSON Lines, JSON arrays and objects over several lines.
- ``parquet.py``, ``text.py``, ``indexed.py``, ``huggingface.py``: the other formats.
- ``extension.py``: sources read by a class of the user.
"""
