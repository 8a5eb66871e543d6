"""Writes every user's top items, as one task of a worker with what one of the run's workers had.

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265  # where `ray dashboard my-cluster.yaml` forwards to
ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-resources '{"train_driver": 1}' -- \
    python jobs/recommend.py /mnt/raygrec/runs/beauty --k 10 --out /mnt/raygrec/top10.parquet
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    main(["recommend", "--ray", *sys.argv[1:]])
