"""Read corpora in every supported storage format.

In reading order:

- ``documents.py``: documents, malformed records, and the base class of readers.
- ``sources.py``: open the reader of a configured source.
- ``listing.py``: list regular files in a folder or matching a glob.
- ``files.py``: find the files of a source and their format.
- ``compression.py``: open files as decompressed streams.
- ``jsonl.py``, ``json_values.py``: JSON Lines, JSON arrays and multi-line objects.
- ``parquet.py``, ``text.py``, ``indexed.py``, ``huggingface.py``: the other formats.
- ``extension.py``: sources read by a user class.
"""
