"""Ranks, processes and addresses: how the parts of a run find each other, start and end.

- ``ranks.py``: the ranks of a run and their collectives on host data
- ``liveness.py``: heartbeats between ranks, which name one that died or hangs
- ``processes.py``: child processes, signals, and supervision
- ``holder.py``: identifies the process that holds an exclusive resource
- ``addresses.py``: addresses that servers listen on
"""
