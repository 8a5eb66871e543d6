"""The run configs that one submits are valid as they stand."""

from pathlib import Path

import pytest

from raygrec.config import read_yaml
from raygrec.train.settings import run_config

FOR_RAY = ("rayjob.yaml", "runtime_env.yaml")
JOBS = [file for file in sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml")) if file.name not in FOR_RAY]
RECIPES = {
    "sasrec": "sequential",
    "sasrec-text": "sequential",
    "bsarec": "sequential",
    "lightgcn": "graph",
    "rlmrec": "graph",
}  # the others bear their recipe's name


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_job_is_a_valid_run_config(file):
    assert run_config(read_yaml(file), str(file)).recipe == RECIPES.get(file.stem, file.stem.split("-")[0])
