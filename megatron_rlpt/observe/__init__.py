"""What a run tells about itself: metrics, stage times, samples, progress, log. None of it imports torch at import."""

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
