"""Predict memory, time and cost of a run before it is queued. Imports no torch.

In reading order:

- ``request``: the input, a ``PlanRequest``. ``teacher``: sizes of a teacher of any family.
- ``hardware``: GPUs, networks and prices, each number with its source. ``transformer``: parameters and FLOPs.
- ``update``, ``generation``: seconds of an optimizer update and of rollouts in a layout.
- ``activations``, ``memory``: bytes of a rank at each moment of a step.
- ``judging``: the cost of judging one group. ``judge_cluster``: how many judges keep up.
- ``plan``: one step put together, ``make_plan``. ``checks``: what cannot start, what runs out first, warnings.
- ``sweep``: other layouts and other splits of the GPUs.
- ``simulation/``: the same run with varying answers, slow workers and failures; ``scenario`` starts it.
- ``report``: a plan as terminal tables, HTML and JSON.

``cli/plan.py`` is the command, ``README.md`` the manual; ``tools/bench/plan_*.py`` compare predictions with
measurements.
"""
