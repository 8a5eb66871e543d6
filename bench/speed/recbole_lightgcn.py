"""RecBole's own LightGCN on its atomic files; run by an interpreter that has it, see prepare.py.

$RECBOLE_PYTHON bench/speed/recbole_lightgcn.py FOLDER SETTINGS, with SETTINGS a JSON object: dim, layers, lr, l2,
batch_size, epochs, evaluate_every. The last line is [[CPU seconds since training began, validation N@10], …].
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import LightGCN
from recbole.trainer import Trainer
from recbole.utils import init_seed

given, folder = json.loads(sys.argv.pop()), Path(sys.argv.pop())
logging.disable()
torch.set_num_threads(1)
os.chdir(folder)  # where its Trainer leaves what it writes
settings = {
    "data_path": str(folder.parent),
    "checkpoint_dir": str(folder / "none"),
    "use_gpu": False,
    "seed": 0,
    "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
    "stopping_step": given["epochs"],
    "embedding_size": given["dim"],
    "n_layers": given["layers"],
    "learning_rate": given["lr"],
    "reg_weight": given["l2"],
    "require_pow": True,
    "train_batch_size": given["batch_size"],
    "eval_batch_size": 2**23,
    "epochs": given["epochs"],
    "eval_step": given["evaluate_every"],
}
config = Config(model="LightGCN", dataset=folder.name, config_dict=settings)
init_seed(config["seed"], reproducibility=True)
data = create_dataset(config)
train, valid, _ = data_preparation(config, data)
model = LightGCN(config, train.dataset)
curve = []
begun = time.process_time()
Trainer(config, model).fit(
    train,
    valid,
    verbose=False,
    saved=False,
    callback_fn=lambda _, found: curve.append([time.process_time() - begun, found]),
)
print(json.dumps(curve))
