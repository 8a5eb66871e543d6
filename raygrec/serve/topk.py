"""Top-k lists from a finished run: batch evaluation and recommending, from the run folder and its store."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raygrec.data.arrays import CSR
from raygrec.data.store import Store
from raygrec.errors import InputError, StorageError
from raygrec.evaluate.ranking import top_k
from raygrec.progress import track
from raygrec.ranks import device
from raygrec.storage import replaced
from raygrec.train.assembly import Model, Prompts, histories, load_model
from raygrec.train.engine import LocalEngine
from raygrec.train.folder import run_at
from raygrec.train.loop import Reporter
from raygrec.train.settings import RunConfig, run_config

ROWS = 65_536  # rows of a parquet row group
AT_ONCE = 128  # users in one pass


class FinishedRun:
    """A run whose model is loaded and ready."""

    def __init__(self, path: Path | str) -> None:
        self.folder = run_at(path)
        self.config: RunConfig = self.folder.config()
        metrics = self.folder.metrics()
        if metrics is None:
            raise InputError(f"{path}: the run has not finished (metrics.json is missing); resume it first")
        self.store = Store.open(self.config.store)
        if metrics["store"] != self.store.fingerprint:
            raise InputError(f"{self.store.path}: not the store that {path} was trained on (its fingerprint differs)")
        model, builder = load_model(self.config, self.folder, self.store)
        self.model: Model = model
        self.builder: Prompts = builder
        self.shown: CSR = histories(self.store, "test").shown

    def top(self, users: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best new items of each user and their scores: [B, k] each.

        Reads all interactions up to the test set's; the score is the log-probability in the first slot.
        """
        items = torch.empty((len(users), k), dtype=torch.int64)
        scores = torch.empty((len(users), k))
        order = np.argsort(self.shown.lengths[users], kind="stable")  # little padding
        for start in range(0, len(order), AT_ONCE):
            part = order[start : start + AT_ONCE]
            items[part], scores[part] = self._top(users[part], k)
        return items, scores

    def _top(self, users: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        shown = self.shown.take(users)
        batch = self.builder.recommending(users, shown, "test", 1).to(device())
        with torch.inference_mode():
            scores = self.model.slot_logits(batch)[:, 0].float().log_softmax(-1).cpu()
        items = top_k(scores, k, [shown], users)
        return items, scores.gather(1, items.clamp(min=0))

    def history(self, user: int) -> list[str]:
        """Titles that the user has interacted with before the test set, oldest first."""
        return [self.store.titles[int(item)] for item in self.shown[user]]


def evaluate_run(path: Path | str, decoding: str | None = None) -> dict[str, Any]:
    """Repeats a finished run's validation and test metrics from its folder and store alone.

    decoding: instead of the run's own. Raises `InputError` for one that the run's config could not have.
    """
    from raygrec.train.local import bar_reporter
    from raygrec.train.pipeline import evaluate, model_ranker, users_of

    config = run_at(path).config()
    if decoding is not None:
        content = config.model_dump(mode="json")
        config = run_config({**content, "evaluate": {**content["evaluate"], "decoding": decoding}}, str(path))
    if not config.evaluate.test:
        raise InputError(
            f"{path}: trained with evaluate.test=false; train with evaluate.test=true to read the test set"
        )
    finished = FinishedRun(path)
    store = finished.store
    engine = LocalEngine(finished.model, config.engine)

    def measure(split: str, reporter: Reporter) -> dict[str, float]:
        ranker = model_ranker(config, engine, finished.builder, config.evaluate.decoding, split)
        return evaluate(config, reporter, split, ranker, *users_of(store, config, split))

    with bar_reporter() as reporter:
        return {split: measure(split, reporter) for split in ("valid", "test")}


def recommend_all(path: Path | str, k: int, out: Path) -> int:
    """Writes every user's top k as parquet (user, rank, item, score, title); returns the number of rows."""
    finished = FinishedRun(path)
    store = finished.store
    if not 1 <= k <= store.num_items:
        raise InputError(f"--k {k}: the catalogue has {store.num_items} items")
    schema = pa.schema(
        [
            ("user", pa.string()),
            ("rank", pa.int32()),
            ("item", pa.string()),
            ("score", pa.float32()),
            ("title", pa.string()),
        ]
    )
    rows = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as draft, pq.ParquetWriter(draft, schema) as writer:
            for start in track(range(0, store.num_users, 512), "recommending"):
                users = np.arange(start, min(start + 512, store.num_users))
                table = _as_table(finished, users, k, schema)
                rows += len(table)
                writer.write_table(table, row_group_size=ROWS)
    except (OSError, StorageError) as error:
        raise InputError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return rows


def _as_table(finished: FinishedRun, users: np.ndarray, k: int, schema: pa.Schema) -> pa.Table:
    items, scores = finished.top(users, k)
    row, rank = (items >= 0).nonzero(as_tuple=True)
    chosen = items[row, rank].tolist()
    store = finished.store
    columns = [
        [store.user_ids[int(users[r])] for r in row.tolist()],
        (rank + 1).tolist(),
        [store.item_ids[item] for item in chosen],
        scores[row, rank].tolist(),
        [store.titles[item] for item in chosen],
    ]
    return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
