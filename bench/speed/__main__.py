"""Speed against what one would otherwise use: a row each, measured in turns in one process, and the page made of them.

    python -m bench.speed head         cross-entropy over the catalogue, against materialised logits
    python -m bench.speed metrics      full-ranking metrics, against torchmetrics
    python -m bench.speed topk         top-10 lists, against constrained beam search over titles and over ids
    python -m bench.speed assembly     prompts from arrays, against tokenizing them in the loop
    python -m bench.speed step         training steps, against the bare language model and Hugging Face's Trainer
    python -m bench.speed frozen       training around a frozen language model, against its naive form
    python -m bench.speed contrast     GAL-Rec's queue from 0 to 65,536, against L0 alone
    python -m bench.speed successors   GAL-Rec with successors and shared ones, against texts alone
    python -m bench.speed lightgcn     epochs and the way to equal quality, against PyG's LightGCN and RecBole's
    python -m bench.speed prepare      a store from a table, against a pandas script and RecBole
    python -m bench.speed checkpoint   writing and reading one, against the bare disk
    python -m bench.speed scaling      updates on 1, 2 and 4 workers under ZeRO 0 to 3, with the bytes that they send
    python -m bench.speed gpu          training steps around Llamas of 1 B and 7 B, on a GPU (else a rehearsal)
    python -m bench.speed plan         what `raygrec plan` foresees, against what processes measure
    python -m bench.speed report       docs/BENCHMARKS.md

Where nothing else is said, OMP_NUM_THREADS=1. A ratio is how many times as long the other took in the same round.
"""

import argparse
import importlib
import os

ROWS = (
    *("head", "metrics", "topk", "assembly", "step", "frozen"),
    *("contrast", "successors", "lightgcn", "prepare", "checkpoint", "scaling", "plan", "gpu"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=(*ROWS, "report"))
    row = parser.parse_args().row
    # Before torch is imported: threads that spin while they wait slow a shared machine down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    importlib.import_module(f"bench.speed.{row}").main()


if __name__ == "__main__":
    main()
