"""Makes what a store keeps for all runs over it (token ids, text vectors, LightGCN's nodes), as one task of a worker.

A training job makes what is missing by itself; a sweep's trials are spared the wait.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/pretrain_graph.py jobs/glta.yaml store=/mnt/raygrec/stores/beauty cluster.gpus_per_worker=1
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["train", "--prepare-only", "--ray", *sys.argv[1:]])
