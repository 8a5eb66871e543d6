"""A Ray that no other on this machine joins, and sums of one order; imported before Ray and torch."""

import os
import secrets
import tempfile
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="rgf", dir="/tmp"))  # sockets want short paths
(HOME / "token").write_text(secrets.token_hex(32))
os.environ |= {
    "RAY_TMPDIR": str(HOME),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(HOME / "token"),
    "OMP_NUM_THREADS": "1",
    "RAYGREC_QUIET": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_raylet_start_wait_time_s": "180",  # on a busy machine
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
os.environ.pop("RAY_ADDRESS", None)
