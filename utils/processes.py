"""The rank of this process among those that `accelerate launch` or torchrun started.

Scripts divide their work by rank; the processes need not communicate for that.
"""

import os


def process_share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
