"""The trainer, in reading order.

- ``run.py``: one run from start to finish: check, lock, open or resume, build, train, export
- ``train.py``: the training loop
- ``build.py``: builds all parts of a run from its configuration
- ``episode_feed.py``: reads the next batch in the background on rank 0 and gives it to all ranks
- ``pipeline.py``: from episodes to judged batches, ``train.staleness`` steps ahead of the update
- ``candidates.py``: original suffix, rewrite and rollouts of an episode
- ``curriculum.py``: number of rollouts per episode
- ``judging.py``: the interface of judging, and judging in the trainer's own processes
- ``buffered_judging.py``: judging by workers behind the rollout buffer
- ``buffer_attachment.py``: the trainer's hold on the rollout buffer
- ``returned_groups.py``: validates what comes back from the rollout buffer
- ``learning.py``: ends a run that learns nothing
- ``gpu_memory.py``: shares GPU memory between the engine and the optimizer state
- ``step_metrics.py``: the metrics of one step
- ``observer.py``: progress display, metrics and samples after every step
- ``state.py``: the state that a checkpoint keeps of a run
- ``stop.py``: stop requests by signal or file
- ``run_record.py``: what a run folder records about its run
- ``run_lock.py``: one trainer per run folder
"""
