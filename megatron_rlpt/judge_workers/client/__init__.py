"""Client of teacher servers that speak OpenAI's API over HTTP. Needs httpx, but neither torch nor vLLM.

    TeacherPool (pool) ── chooses ──> Endpoint (endpoint) ── exchange (http) ──> server
        │  queue, retries, deadline       │  circuit breaker (breaker), probes, counters
        └── Request -> Call (calls) ──────┘  body -> Reply or ServerProblem (replies, faults)

``secrets`` masks keys in everything that is logged or stored.
"""
