"""The rollout buffer: a durable store of groups between the trainer and the workers that judge them.

In reading order:

- ``protocol.py``: the contract of a buffer, its return types, and polling intervals.
- ``open.py``: opens the buffer that a configuration names; reads the password of its server.
- ``store_rules.py``: argument checks and errors shared by all stores.
- ``codec.py``: groups and replies as bytes.
- ``sqlite_store.py``: the buffer in an SQLite file, for one machine.
- ``sqlite_file.py``: tables, transactions and errors of that file.
- ``redis_store.py``: the buffer in Redis, for any number of machines.
- ``redis_store.lua``: the operations that run inside Redis.
- ``redis_connection.py``: requirements on the Redis server, retries and errors.
"""
