"""Trains and evaluates on Ray Train workers; the driver waits on the head. `--resume` goes on with a run cut off.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/train.py jobs/glta.yaml store=/mnt/raygrec/stores/beauty out=/mnt/raygrec/runs/beauty \
    cluster.workers=4 cluster.gpus_per_worker=1 cluster.max_failures=20
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
