"""Turns raw interactions and item texts into a store, on the head.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/prepare.py amazon /mnt/raygrec/sources/beauty --out /mnt/raygrec/stores/beauty k_core=5
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
