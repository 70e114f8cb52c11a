"""Rollouts: continuations sampled from the current policy, and the sync that keeps the engine's weights current.

Reading order:

    engine.py              the protocol: prompts in, continuations out, weights by version
    build.py               which engine a run gets, and whether it can generate during updates
    distributed_engine.py  one engine per rank behind the protocol of one engine
    vllm/                  the vLLM engine: LLM object, its process, its environment, code inside its worker
    megatron/              the Megatron engine: rollout model, static generation loop, seeded sampling
    weight_sync/           policy weights -> engine

From weights to the engine: ``policy.weights()`` (``policy/weights.py: WeightSource``) streams whole Hugging Face
tensors -> ``engine.update_weights`` -> ``weight_sync/transport.py`` picks the way by ``EngineMode`` ->
``vllm/worker.py`` loads them inside the worker. The Megatron engine takes the model itself instead
(``weight_sync/megatron_refit.py``).
"""
