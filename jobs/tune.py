"""Searches settings with Ray Tune; its trials' drivers wait on the head. `--resume` goes on with a sweep cut off.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/tune.py tune_spaces/galrec.yaml store=/mnt/raygrec/stores/beauty out=/mnt/raygrec/sweeps/beauty \
    cluster.workers=2 cluster.gpus_per_worker=1 concurrency=4 --final-seeds 3
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
