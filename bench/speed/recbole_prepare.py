"""RecBole's own way from its atomic files to data loaders; run by an interpreter that has it, see prepare.py.

$RECBOLE_PYTHON bench/speed/recbole_prepare.py FOLDER
"""

import json
import logging
import sys
from pathlib import Path

from recbole.config import Config
from recbole.data import create_dataset, data_preparation

folder = Path(sys.argv.pop())
logging.disable()
settings = {
    "data_path": str(folder.parent),
    "checkpoint_dir": str(folder / "none"),
    "use_gpu": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title", "categories"]},
    "rm_dup_inter": "first",
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
}
config = Config(model="BPR", dataset=folder.name, config_dict=settings)
data = create_dataset(config)
loaders = data_preparation(config, data)
facts = {"users": data.user_num - 1, "items": data.item_num - 1}  # without RecBole's padding
counts = {name: len(loader._dataset) for name, loader in zip(("train", "valid", "test"), loaders, strict=True)}
print(json.dumps(facts | counts))
