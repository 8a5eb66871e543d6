"""What one would write in pandas: the same filters, ids, splits and texts as `raygrec prepare table`.

python bench/speed/pandas_prepare.py FOLDER OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True)

data = pd.read_csv(folder / "interactions.csv", dtype={"user": str, "item": str})
data = data.sort_values(["user", "time"], kind="stable").drop_duplicates(["user", "item"])
while True:
    users, items = data["user"].map(data["user"].value_counts()), data["item"].map(data["item"].value_counts())
    kept = (users >= 5) & (items >= 5)
    if kept.all():
        break
    data = data[kept]
data["u"], user_ids = pd.factorize(data["user"])
data["i"], item_ids = pd.factorize(data["item"])
from_end = data.groupby("u").cumcount(ascending=False)
split = np.where(from_end == 0, "test", np.where(from_end == 1, "valid", "train"))
for name in ("train", "valid", "test"):
    part = data[split == name].sort_values("u", kind="stable")
    counts = np.bincount(part["u"], minlength=len(user_ids))
    np.save(out / f"{name}.indptr.npy", np.concatenate([[0], counts.cumsum()]))
    np.save(out / f"{name}.indices.npy", part["i"].to_numpy(np.int32))
texts = pd.read_csv(folder / "items.csv", dtype=str, keep_default_na=False).drop_duplicates("item").set_index("item")
texts = texts.loc[item_ids]
texts["text"] = texts["title"] + ". " + texts["categories"].str.replace("|", ", ")
texts.to_parquet(out / "items.parquet")
pd.Series(user_ids).to_csv(out / "users.csv", header=False)
facts = {"users": len(user_ids), "items": len(item_ids)}
print(json.dumps(facts | {name: int((split == name).sum()) for name in ("train", "valid", "test")}))
