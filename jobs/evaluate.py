"""Repeats a finished run's metrics, as one task of a worker with what one of the run's workers had.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/evaluate.py /mnt/raygrec/runs/beauty
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["evaluate", "--ray", *sys.argv[1:]])
