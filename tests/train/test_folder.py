import json
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raygrec.errors import InputError, StorageError
from raygrec.train import manifest
from raygrec.train.folder import KEEP, LoopState, RunFolder, with_absolute_paths
from raygrec.train.settings import RunConfig, run_config
from tests.test_storage import file_limit, modes, umask
from tests.train.workers import tiny_config, tiny_galrec_config

TENSORS = {"param/w": torch.arange(6.0).view(2, 3), "exp_avg/w": torch.zeros(2, 3)}


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return tiny_config(tmp_path / "store", tmp_path / "backbone", tmp_path / "run")


@pytest.fixture
def folder(config) -> RunFolder:
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    return folder


def hidden(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.path.rglob(".*")]


def test_the_config_comes_back_as_it_was(folder, config):
    assert folder.config() == config
    assert not hidden(folder)


def test_a_used_folder_is_refused(folder, config, tmp_path):
    with pytest.raises(InputError, match=r"run: holds a run already; pass --resume"):
        folder.start(config, resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        RunFolder(tmp_path).start(config, resume=True)
    with pytest.raises(InputError, match=r"notes\.txt: cannot be a run folder"):
        RunFolder(tmp_path / "notes.txt").start(config, resume=False)


def test_resuming_takes_the_same_config_only(folder, config):
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(InputError, match=r"config\.yaml: the run was started with seed=0, now it is 1"):
        folder.start(other, resume=True)
    nested = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(InputError, match=r"started with train\.lr=0\.01, now it is 0\.5"):
        folder.start(nested, resume=True)
    assert folder.config() == config


def test_resuming_with_other_workers_is_recorded(folder, config):
    wider = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 7})})
    folder.start(wider, resume=True)
    assert folder.config() == wider


def other_than(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """The config with these settings, checked as one that is given with `--resume`."""
    content = config.model_dump(mode="json")
    return run_config(content | {name: content[name] | values for name, values in sections.items()}, "test")


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 0},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"activation_checkpointing": True},
    ],
)
def test_resuming_with_the_state_spread_or_held_in_another_way_is_recorded(folder, config, engine):
    other = other_than(config, engine=engine)
    assert other != config
    folder.start(other, resume=True)
    assert folder.config() == other


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"precision": "bf16"}}, r"started with engine\.precision=fp32, now it is bf16"),
        ({"engine": {"zero_stage": 0, "clip": 0.5}}, r"started with engine\.clip=1\.0, now it is 0\.5"),
        ({"train": {"micro_batch": 6}}, r"started with train\.micro_batch=12, now it is 6"),
        ({"model": {"successors": {}}}, r"started with model\.successors\.steps=None, now it is 3"),
    ],
)
def test_resuming_refuses_what_changes_the_result(tmp_path, sections, message):
    slow = {"contrast": {"momentum": 0.9}}
    config = tiny_galrec_config(tmp_path / "store", tmp_path / "backbone", tmp_path / "run", model=slow)
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    with pytest.raises(InputError, match=message):
        folder.start(other_than(config, **sections), resume=True)
    assert folder.config() == config


def test_a_section_that_was_there_may_not_be_left_out(tmp_path):
    successors = {"successors": {"steps": 2}}
    config = tiny_galrec_config(tmp_path / "store", tmp_path / "backbone", tmp_path / "run", model=successors)
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    with pytest.raises(InputError, match=r"started with model\.successors\.steps=2, now it is None"):
        folder.start(other_than(config, model={"successors": None}), resume=True)


def test_resuming_from_another_directory(folder, config, monkeypatch):
    monkeypatch.chdir(folder.path.parent)
    near = tiny_config("store", config.backbone.name, "run")
    RunFolder(near.out).start(near, resume=True)
    assert with_absolute_paths(near) == config


def test_a_backbones_folder_is_known_from_another_directory(config, tmp_path, monkeypatch):
    for name in ("backbone", "minilm"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(tiny_config("store", "backbone", "run")) == config
    for name in ("minilm", "prajjwal1/bert-tiny", "s3://bucket/backbone"):  # none of these is a folder
        assert with_absolute_paths(tiny_config("store", name, "run")).backbone.name == name


def test_a_claim_is_given_up_where_the_block_fails(config):
    folder = RunFolder(config.out)
    with pytest.raises(InputError, match="no such backbone"), folder.claimed(config, resume=False):
        assert folder.config() == config
        raise InputError("no such backbone")
    assert not folder.path.exists()


def test_a_run_that_existed_outlives_a_failed_claim(folder, config):
    with pytest.raises(InputError), folder.claimed(config, resume=True):
        raise InputError("no such backbone")
    assert folder.config() == config


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"no run there \(config\.yaml is missing\)"):
        RunFolder(tmp_path).config()


def test_a_checkpoint_comes_back_as_it_was(folder):
    state = LoopState("train", step=3, best=0.25, best_step=2, waited=1, records=4, sums=[1.5, 2.0], counts=[8.0, 3.0])
    folder.save_checkpoint(state, TENSORS)
    found, tensors = folder.last_checkpoint("train")
    assert found == state
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert folder.last_checkpoint("alignment") is None


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_whoever_may_read_a_run_may_read_its_checkpoints(folder, mask, mode):
    with umask(mask):
        folder.save_checkpoint(LoopState("train", 3), TENSORS)
        with folder.drafted(folder.model_folder) as draft:
            (draft / "backbone").mkdir()
            save_file(TENSORS, draft / "backbone" / "model.safetensors")
    for place, count in ((folder.checkpoints, 3), (folder.model_folder, 2)):
        assert list(modes(place).values()) == count * [mode]


def test_the_newest_checkpoints_of_each_stage_are_kept(folder):
    for step in (1, 9, 10, 100):
        folder.save_checkpoint(LoopState("train", step), TENSORS)
    folder.save_checkpoint(LoopState("alignment", 5), TENSORS)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert KEEP == 2
    assert names == ["alignment-00000005", "train-00000010", "train-00000100"]
    assert folder.last_checkpoint("train")[0].step == 100


def test_a_draft_never_counts(folder):
    folder.save_checkpoint(LoopState("train", 1), TENSORS)
    # As a process leaves it that is killed while it writes the next one.
    half = folder.checkpoints / ".train-00000002.draft"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"\x10\x00")
    (folder.path / ".metrics.json.draft").write_text('{"valid": {')
    assert folder.last_checkpoint("train")[0].step == 1
    assert folder.metrics() is None
    folder.save_checkpoint(LoopState("train", 2), TENSORS)
    assert folder.last_checkpoint("train")[0].step == 2
    assert hidden(folder) == [".metrics.json.draft"]
    half.mkdir()
    folder.start(folder.config(), resume=True)
    assert not hidden(folder)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)


DAMAGES = {
    "truncated": (lambda place: os.truncate(place / "state.safetensors", 100), r"state\.safetensors: has 100 bytes"),
    "flipped": (lambda place: flip(place / "state.safetensors"), r"state\.safetensors: its checksum is not that of"),
    "other": (lambda place: (place / "loop.json").write_text("{}\n"), r"loop\.json: has 3 bytes"),
    "manifest": (lambda place: (place / "manifest.json").unlink(), r"manifest\.json: is missing"),
    "link": (lambda place: place.symlink_to(place.rename(place.parents[1] / "elsewhere")), "train-00000003: is a link"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_a_line(folder, kind):
    for step in (1, 2, 3):
        folder.save_checkpoint(LoopState("train", step), {"param/w": torch.full((64,), float(step))})
    damage, message = DAMAGES[kind]
    damage(folder.checkpoints / "train-00000003")
    lines: list[str] = []
    state, tensors = folder.last_checkpoint("train", lines.append)
    assert state.step == 2
    assert torch.equal(tensors["param/w"], torch.full((64,), 2.0))
    assert len(lines) == 1
    assert re.search(f"{message}.*; this checkpoint is left out, the run goes on from train-00000002$", lines[0])
    # What comes next is kept though the damaged one has a later step, and the damaged one is not met again.
    folder.go_on_from(state)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["train-00000002"]
    assert kind != "link" or len(list((folder.path / "elsewhere").iterdir())) == 3
    folder.save_checkpoint(LoopState("train", 3), TENSORS)
    assert folder.last_checkpoint("train", lines.append)[0].step == 3
    assert len(lines) == 1


def test_nothing_but_damaged_checkpoints_is_an_error(folder):
    for step in (1, 2):
        folder.save_checkpoint(LoopState("train", step), TENSORS)
        flip(folder.checkpoints / f"train-{step:08d}" / "state.safetensors")
    message = r"train-00000002/state\.safetensors: its checksum .*none of the 2 checkpoints of stage 'train' is whole"
    with pytest.raises(InputError, match=message):
        folder.last_checkpoint("train")


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(folder):
    folder.save_checkpoint(LoopState("train", 1), TENSORS)
    with (
        pytest.raises(StorageError, match=r"train-00000002: cannot be written: .* \(4\.00 MiB needed, [\d.]+ MiB left"),
        file_limit(2**20),
    ):
        folder.save_checkpoint(LoopState("train", 2), {"param/w": torch.zeros(2**20)})
    assert not hidden(folder)
    assert folder.last_checkpoint("train")[0].step == 1
    with pytest.raises(StorageError, match=r"history\.jsonl: cannot be written: File too large"), file_limit(10):
        folder.report({"step": 1, "loss": 0.5})
    assert folder.history() == []
    with pytest.raises(StorageError, match=r"metrics\.json: cannot be written"), file_limit(10):
        folder.write_metrics({"test": {"ndcg@10": 0.5}})
    assert folder.metrics() is None
    assert not hidden(folder)


def test_a_loop_state_of_another_kind_is_named(folder):
    def sealed(content: str) -> Path:
        folder.save_checkpoint(LoopState("train", 1), TENSORS)
        place = folder.checkpoints / "train-00000001"
        (place / "loop.json").write_text(content)
        (place / "manifest.json").unlink()
        manifest.seal(place)
        return place

    sealed('{"stage": "train", "steps": 1}')
    with pytest.raises(InputError, match=r"loop\.json: not the loop state of this version"):
        folder.last_checkpoint("train")
    sealed("{")
    with pytest.raises(InputError, match=r"loop\.json: not valid JSON"):
        folder.last_checkpoint("train")
    # The next checkpoint would be written to a place of its choice.
    sealed('{"stage": "../../train", "step": 1}')
    with pytest.raises(InputError, match=r"loop\.json: is of \.\./\.\./train-00000001, not of train-00000001"):
        folder.last_checkpoint("train")
    place = sealed(json.dumps(asdict(LoopState("train", 1))))
    (place / "state.safetensors").write_bytes(pickle.dumps({"param/w": 1}))
    (place / "manifest.json").unlink()
    manifest.seal(place)
    with pytest.raises(InputError, match=r"state\.safetensors: not readable as safetensors"):
        folder.last_checkpoint("train")


def test_damaged_files_are_named(folder):
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors"):
        folder.load_parts(folder.model_file)
    lines: list[str] = []
    file = folder.parts_file("train")
    assert not folder.has_parts(file, lines.append)
    assert not lines
    folder.save_parts(file, TENSORS)
    assert folder.has_parts(file, lines.append)
    flip(file)
    with pytest.raises(InputError, match=r"train\.safetensors: damaged, its tensors do not have the checksum"):
        folder.load_parts(file)
    assert not folder.has_parts(file, lines.append)
    assert [line.partition(": ")[2][:7] for line in lines] == ["damaged"]
    (folder.path / "metrics.json").write_text("")
    with pytest.raises(InputError, match=r"metrics\.json: not valid JSON"):
        folder.metrics()


def test_parts_come_back_as_they_were(folder):
    folder.save_parts(folder.model_file, TENSORS)
    assert torch.equal(folder.load_parts(folder.model_file)["param/w"], TENSORS["param/w"])
    assert not hidden(folder)


def test_reports_after_a_checkpoint_are_forgotten(folder):
    assert folder.history() == []
    for step in range(4):
        folder.report({"step": step})
    folder.forget_after(4)
    assert [record["step"] for record in folder.history()] == [0, 1, 2, 3]
    folder.forget_after(2)
    assert folder.history() == [{"step": 0}, {"step": 1}]


def test_a_report_that_was_cut_off_does_not_count(folder):
    folder.report({"step": 0})
    with folder.history_file.open("a") as file:
        file.write('{"step": 1, "lo')
    assert folder.history() == [{"step": 0}]
    folder.forget_after(1)
    folder.report({"step": 1})
    assert folder.history() == [{"step": 0}, {"step": 1}]


def test_metrics_are_the_sign_of_a_finished_run(folder):
    assert folder.metrics() is None
    folder.write_metrics({"test": {"ndcg@10": 0.5}})
    assert folder.metrics() == {"test": {"ndcg@10": 0.5}} == json.loads((folder.path / "metrics.json").read_text())


def test_a_folder_takes_its_place_only_when_it_is_filled(folder):
    with folder.drafted(folder.model_folder) as draft:
        (draft / "first").write_text("1")
    with pytest.raises(OSError, match="full"), folder.drafted(folder.model_folder) as draft:
        (draft / "second").write_text("2")
        raise OSError("full")
    assert {path.name for path in folder.model_folder.iterdir()} == {"first", "manifest.json"}
    assert not hidden(folder)
    with folder.drafted(folder.model_folder) as draft:
        assert not list(draft.iterdir())
        (draft / "third").write_text("3")
    assert {path.name for path in folder.model_folder.iterdir()} == {"third", "manifest.json"}
    manifest.check(folder.model_folder)
    assert not hidden(folder)


# ---- what others may have put there


def test_the_folder_of_a_living_run_is_refused(folder, config):
    other = RunFolder(folder.path)
    message = rf"run: process {os.getpid()} on \S+ is at work there; wait for its end, or name another out"
    with folder.held(), pytest.raises(InputError, match=message), other.held():
        pass
    with other.held():
        folder.start(config, resume=True)  # the lock is no sign of a foreign folder
    new = RunFolder(folder.path.parent / "new")
    new.path.mkdir()
    (new.path / ".config.yaml.here-1.draft").touch()  # of a start that was cut off
    with new.held():
        new.start(config, resume=False)
    foreign = folder.path.parent / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"), RunFolder(foreign).held():
        pass
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]


def test_a_config_executes_nothing(folder, tmp_path):
    mark = tmp_path / "executed"
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir"):
        folder.config_file.write_text(f"seed: !!{tag} ['{mark}']\n")
        with pytest.raises(InputError, match=r"config\.yaml"):
            folder.config()
    assert not mark.exists()


def test_links_are_not_written_through(folder, config, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    folder.history_file.symlink_to(victim / "file")
    with pytest.raises(OSError, match="symbolic links"):
        folder.report({"step": 0})
    (folder.checkpoints / "train-00000001").symlink_to(victim)
    (folder.checkpoints / ".train-00000002.draft").symlink_to(victim)
    folder.parts_file("train").symlink_to(victim / "file")
    folder.save_parts(folder.parts_file("train"), TENSORS)
    for step in (2, 3, 4):
        folder.save_checkpoint(LoopState("train", step), TENSORS)
    folder.start(config, resume=True)
    assert [(path.name, path.read_text()) for path in victim.iterdir()] == [("file", "mine")]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "train-00000003",
        "train-00000004",
        "train.safetensors",
    ]
    assert not folder.parts_file("train").is_symlink()


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("runs/beauty", "beauty"),
        ("runs/search/trials/t3/seed-0", "search/t3/seed-0"),
        ("runs/search/final/t3/seed-2", "search/t3/seed-2"),
        ("runs/search/seed-2", "seed-2"),
    ],
)
def test_what_trackers_list_a_run_as(path, title):
    assert RunFolder(Path(path)).title == title
