"""Start both ranks of ``world_of_two.py`` as torchrun does, as forks of this process.

Nothing else is imported at the top: the process of the engine imports this file again.
"""

import sys
import uuid
from pathlib import Path

if __name__ == "__main__":
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from world_of_two import main

    # As ``torchrun --standalone --nproc-per-node 2``.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, main)(*map(Path, sys.argv[1:]))
