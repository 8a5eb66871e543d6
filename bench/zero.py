"""The same run under ZeRO 0, 1, 2 and 3 on two Ray Train workers: metrics and memory per worker.

python -m bench.zero
"""

import json
import shutil
import subprocess

from bench.quality import RESULTS, ROOT, WORK, demo_store, raygrec

WORKERS = 2
SETTINGS = [
    "backbone.layers=2",
    "graph.dim=64",
    "graph.batch_size=1024",
    "graph.epochs=20",
    "alignment.epochs=1",
    "alignment.batch=16",
    "histories.epochs=2",
    "histories.batch=64",
    "histories.micro_batch=32",
    "train.epochs=1",
    "train.batch=64",
    "train.micro_batch=32",
    f"cluster.workers={WORKERS}",
]


def main() -> None:
    folder = WORK / "zero"
    shutil.rmtree(folder, ignore_errors=True)
    store = demo_store()
    stages = {}
    for stage in range(4):
        run = folder / f"zero-{stage}"
        command = ["train", "jobs/glta.yaml", f"store={store}", f"out={run}", f"engine.zero_stage={stage}", *SETTINGS]
        subprocess.run(raygrec(*command), cwd=ROOT, check=True)
        metrics = json.loads((run / "metrics.json").read_text())
        history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        stages[stage] = {
            "valid": metrics["valid"]["ndcg@10"],
            "test": metrics["test"]["ndcg@10"],
            "loss": history[-1]["loss"],
            "peak_memory_mib": metrics["peak_memory_mib"],
        }
        print(stage, stages[stage])
    result = {"workers": WORKERS, "command": "python -m bench.zero", "stages": stages}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "zero.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
