"""Fixtures that several rooms share: a tiny data set, a tiny backbone, quiet bars."""

import os
from pathlib import Path

# Before torch is imported, and for the processes that tests start: sums of one thread have one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.tiny import make_backbone, make_store

os.environ["RAYGREC_QUIET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory):
    """48 users, 24 items in four tastes, leave-one-out."""
    return make_store(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_unordered_store(tmp_path_factory: pytest.TempPathFactory):
    """The same interactions, split per user at random."""
    return make_store(tmp_path_factory.mktemp("tiny"), "ratio")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random BERT with a word-piece tokenizer, as a folder in `transformers` format."""
    return make_backbone(tmp_path_factory.mktemp("backbone"))
