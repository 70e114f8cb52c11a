"""Asking teacher servers that speak OpenAI's API, over HTTP. Needs httpx and neither torch nor vLLM.

TeacherPool ── chooses ──> Endpoint ── exchange ──> server
    │  queue, retries, deadline   │  breaker, probe, counters
    └── Request -> Call (calls) ──┘  Reply or Problem (replies)
"""
