"""The run configs that one submits are valid as they stand."""

from pathlib import Path

import pytest

from raygrec.config import read_yaml
from raygrec.train.settings import run_config

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))
RECIPES = {
    "sasrec": "sequential",
    "bsarec": "sequential",
    "lightgcn": "graph",
    "rlmrec": "graph",
}  # the others bear their recipe's name


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_job_is_a_valid_run_config(file):
    assert run_config(read_yaml(file), str(file)).recipe == RECIPES.get(file.stem, file.stem.split("-")[0])
