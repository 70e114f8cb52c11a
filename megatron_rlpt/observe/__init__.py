"""What a run reports: metrics, stage times, samples, progress, log. Importing this package does not import torch.

- ``log.py``: the log; ``progress.py``: the progress display; ``terminal.py``: safe output to a terminal
- ``metrics.py``: one record per step, to ``metrics.jsonl`` and to the trackers in ``trackers.py``
- ``prometheus.py``: the same for Prometheus, served by rank 0
- ``samples.py``: a few episodes of every step in full; ``jsonl.py``: the files that both use
- ``stages.py``: stage times and trace; ``watchdog.py``: heartbeat, and an end for a run without progress
- ``run_json.py``: the record of a run in its folder; ``precision.py``: resolves the precisions that are ``auto``
- ``machine.py``: resources of this machine; ``probe.py``: imports risky packages in a separate process
- ``html_page.py``: the page that all HTML reports share
"""

from megatron_rlpt.observe.log import get_logger, setup_logging
from megatron_rlpt.observe.metrics import MetricsWriter, open_metrics
from megatron_rlpt.observe.progress import Progress
from megatron_rlpt.observe.samples import SampleTable, Selection
from megatron_rlpt.observe.stages import StageTimer

__all__ = [
    "MetricsWriter",
    "Progress",
    "SampleTable",
    "Selection",
    "StageTimer",
    "get_logger",
    "open_metrics",
    "setup_logging",
]
