"""Judge workers and teacher servers: separate processes that judge the groups of the rollout buffer.

serve.py            ``rlpt judge serve``: builds one worker and runs it until SIGTERM
supervisor.py       ``rlpt judge serve --workers N``: several workers on one machine
worker.py           claims groups from the buffer, has them processed, completes or gives them back
group_processor.py  the work on one group: rewrite, then judge; caches replies
discovery.py        teacher servers announced in the buffer
client/             HTTP client of teacher servers
teacher_server.py   ``rlpt teacher serve``: runs and announces a vLLM server
metrics.py          Prometheus metrics of a worker
"""
