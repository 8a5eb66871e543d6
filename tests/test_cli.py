import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raygrec import cli
from raygrec.data.store import Store
from raygrec.train.folder import RunFolder
from tests.train.workers import tiny_config, tiny_galrec_config, tiny_sequential_config


@pytest.fixture
def raygrec(capfd, monkeypatch):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["raygrec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capfd.readouterr()

    return run


def config_file(folder: Path, store, backbone: Path, **changes: object) -> tuple[Path, Path]:
    """A run config as a file, and its run folder."""
    config = tiny_config(store.path, backbone, folder / "run", **changes)
    file = folder / "run.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    return file, config.out


@pytest.fixture(scope="module")
def trained(tiny_store, tiny_backbone, tmp_path_factory):
    """(config file, run folder) of a run that `raygrec train --local --json` has finished, and what it printed."""
    file, out = config_file(tmp_path_factory.mktemp("cli"), tiny_store, tiny_backbone)
    return file, out, trained_alone(file)


def trained_alone(file: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    return subprocess.run(
        [sys.executable, "-m", "raygrec.cli", "train", file, "--local", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment | {"RAYGREC_QUIET": "0"},
    )


def one_line(error: str) -> str:
    assert error.startswith("raygrec: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("recipe", ["glta", "galrec"])
def test_training_prints_one_json_document_and_nothing_else(recipe, trained, tiny_store, tiny_backbone, tmp_path):
    _, out, done = trained
    if recipe == "galrec":
        file, out = tmp_path / "run.yaml", tmp_path / "run"
        file.write_text(tiny_galrec_config(tiny_store.path, tiny_backbone, out).model_dump_json())
        done = trained_alone(file)
    assert json.loads(done.stdout) == RunFolder(out).metrics()
    assert done.stderr == "" or all(" in " in line and "/s" in line for line in done.stderr.splitlines())


def test_evaluating_repeats_the_metrics(raygrec, trained):
    _, out, _ = trained
    code, output, _ = raygrec("evaluate", out, "--json")
    metrics = RunFolder(out).metrics()
    assert (code, json.loads(output.splitlines()[-1])) == (0, {key: metrics[key] for key in ("valid", "test")})


def test_evaluating_from_another_directory(raygrec, tiny_store, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_backbone.parent)
    name = Path(tiny_backbone.name)
    file, out = config_file(tmp_path, tiny_store, name, alignment={"epochs": 0}, train={"epochs": 1})
    assert raygrec("train", file, "--prepare-only")[0] == 0
    made = set((tiny_store.path / "text_vectors").iterdir())
    assert raygrec("train", file, "--local")[0] == 0
    assert set((tiny_store.path / "text_vectors").iterdir()) == made
    monkeypatch.chdir(tmp_path)
    code, output, _ = raygrec("evaluate", "run", "--json")
    assert (code, json.loads(output.splitlines()[-1])["test"]) == (0, RunFolder(out).metrics()["test"])


def test_evaluating_shows_a_table_of_the_runs_own_cut_offs(raygrec, trained):
    _, out, _ = trained
    code, output, _ = raygrec("evaluate", out)
    assert code == 0
    title, header, row, folder = output.splitlines()
    assert title.strip() == "test, full ranking"
    assert header.split() == ["method", "P@2", "N@2", "H@2", "P@3", "N@3", "H@3"]
    test = RunFolder(out).metrics()["test"]
    names = ("precision@2", "ndcg@2", "hit@2", "precision@3", "ndcg@3", "hit@3")
    assert row.split() == ["GLTA", *(f"{test[name]:.4f}".removeprefix("0") for name in names)]
    assert folder == f"run folder: {out}"


def test_a_table_names_the_runs_own_method(raygrec, tiny_store, tiny_backbone, tmp_path):
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", train={"epochs": 1})
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())
    code, output, _ = raygrec("train", file, "--local")
    assert code == 0
    assert [line[:18].strip() for line in output.splitlines()[2:4]] == ["Popularity", "BSARec-like + text"]


def test_recommending(raygrec, trained, tiny_store, tmp_path):
    _, out, _ = trained
    file = tmp_path / "top.parquet"
    code, output, _ = raygrec("recommend", out, "--k", 3, "--out", file, "--json")
    rows = 3 * tiny_store.num_users
    assert (code, json.loads(output.splitlines()[-1])) == (0, {"file": str(file), "rows": rows})
    assert pq.read_table(file).num_rows == rows
    code, output, _ = raygrec("recommend", out, "--k", 3, "--out", file)
    assert (code, output) == (0, f"{file}: {rows:,} rows\n")


def test_preparing(raygrec, tmp_path):
    (tmp_path / "interactions.csv").write_text("user,item,time\n" + "".join(f"u,i{n},{n}\n" for n in range(4)))
    arguments = ("prepare", "table", tmp_path, "--out", tmp_path / "store", "k_core=0")
    code, output, _ = raygrec(*arguments, "--json")
    assert code == 0
    counts = {"users": 1, "items": 4, "train": 2, "valid": 1, "test": 1}
    assert json.loads(output.splitlines()[-1]) == {"store": str(tmp_path / "store"), **counts}
    code, _, error = raygrec(*arguments)
    assert code == 2
    assert "store" in one_line(error)


def test_a_terminated_preparation_leaves_nothing(tmp_path):
    rows = "".join(f"u{n % 1000},i{n % 997},{n}\n" for n in range(1_000_000))  # a second's work at least
    (tmp_path / "interactions.csv").write_text("user,item,time\n" + rows)
    process = subprocess.Popen(
        [sys.executable, "-m", "raygrec.cli", "prepare", "table", tmp_path, "--out", tmp_path / "store"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".store.draft-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "")
    assert [path.name for path in tmp_path.iterdir()] == ["interactions.csv"]


def test_resuming_a_finished_run_repeats_its_metrics(raygrec, trained):
    file, out, _ = trained
    before = (out / "metrics.json").read_bytes()
    code, output, _ = raygrec("train", file, "--local", "--resume", "--json", "cluster.workers=5")
    assert (code, json.loads(output.splitlines()[-1])) == (0, json.loads(before))
    assert (out / "metrics.json").read_bytes() == before
    assert RunFolder(out).config().cluster.workers == 2  # of the workers that made the numbers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "holds a run already; pass --resume to go on with it, or name another out"),
        (("--resume", "seed=3"), "the run was started with seed=0, now it is 3"),
        (("train.epoch=3",), "unknown key 'train.epoch'; the nearest known key is 'train.epochs'"),
        (("train.lr=fast",), "key 'train.lr': Input should be a valid number"),
        (("train.lr",), "override 'train.lr': expected key.sub=value"),
        (("out=null",), "key 'out'"),
    ],
)
def test_wrong_runs_end_with_one_line_and_code_2(raygrec, trained, arguments, says):
    code, output, error = raygrec("train", trained[0], "--local", *arguments)
    assert (code, output) == (2, "")
    assert says in one_line(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("store=nowhere", "nowhere"),
        ("backbone.name=nothing/there", "'nothing/there'"),
        ("evaluate.decoding=slots evaluate.ks=[10]", "model.slots is 3, lists of 10 need as many"),
        ("backbone.layers=9", "key 'backbone.layers': 9 given, "),
        ("model.max_history=480", "model.max_history=480 with slots=3 and texts.terms=4 makes prompts of up to 5"),
        ("engine.betas=[2,3]", "key 'engine.betas.0': Input should be less than 1 (got 2)"),
        ("seed=99999999999999999999999", "key 'seed': Input should be less than 9223372036854775808"),
        ("seed=-1", "key 'seed': Input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_start_leaves_no_run_folder(raygrec, trained, tmp_path, change, says):
    code, _, error = raygrec("train", trained[0], "--local", f"out={tmp_path / 'run'}", *change.split())
    assert code == 2
    assert says in one_line(error)
    assert not list(tmp_path.iterdir())


def test_preparing_only_fills_the_store(raygrec, tiny_store, tiny_backbone, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(tiny_store.path, store, ignore=shutil.ignore_patterns("tokens", "graph", "text_vectors"))
    file, out = config_file(tmp_path, Store.open(store), tiny_backbone)
    code, output, _ = raygrec("train", file, "--prepare-only", "--json")
    assert (code, json.loads(output.splitlines()[-1])) == (0, {"store": str(store)})
    assert not out.exists()
    made = {file: file.stat().st_mtime_ns for file in (store / "graph").glob("*.safetensors")}
    assert len(made) == 1
    assert (store / "tokens").exists()
    assert raygrec("train", file, "--local")[0] == 0
    assert {file: file.stat().st_mtime_ns for file in (store / "graph").glob("*.safetensors")} == made
    code, _, error = raygrec("train", file, "--ray")
    assert (code, one_line(error).startswith("raygrec: --ray: ")) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evaluate", "nowhere"), "nowhere: no run there (config.yaml is missing)"),
        (("recommend", "nowhere"), "nowhere: no run there (config.yaml is missing)"),
        (("train", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("prepare", "parquet", "nowhere", "--out", "store"), "parquet"),
        (("evaluate", "nowhere", "--decoding", "last"), "--decoding last: expected first, slots or autoregressive"),
        (("evaluate", "ftp://host/run"), "ftp://host/run: addresses begin with one of s3://, gs://, file://"),
        (("prepare", "table", "s3://bucket/x", "--out", "store"), "prepare from and to a path"),
        (("prepare", "table", "nowhere", "--out", "s3://bucket/x"), "prepare from and to a path"),
        (("recommend", "nowhere", "--out", "s3://bucket/x"), "an address is no good here; name a path"),
        (("demo", "--out", "s3://bucket/x"), "an address is no good here; name a path"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(raygrec, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, output, error = raygrec(*arguments)
    assert (code, output) == (2, "")
    assert says in one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("fly",), ("train",), ("evaluate", "run", "--fast"), ("recommend", "r", "--k", "x")]
)
def test_wrong_usage_ends_with_code_2(raygrec, arguments):
    code, output, error = raygrec(*arguments)
    assert (code, output) == (2, "")
    assert "Usage" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("stage", ["histories", "train"])
def test_a_run_that_fails_ends_with_one_line_and_code_1(raygrec, tiny_store, tiny_backbone, tmp_path, stage):
    file, out = config_file(tmp_path, tiny_store, tiny_backbone, alignment={"epochs": 0})
    code, output, error = raygrec("train", file, "--local", f"{stage}.lr=1e30")
    assert (code, output) == (1, "")
    assert f"{stage}: the loss is" in one_line(error)
    assert f"lower {stage}.lr" in error
    assert RunFolder(out).metrics() is None


def test_debugging_shows_the_traceback(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    file, _ = config_file(tmp_path, tiny_store, tiny_backbone, alignment={"epochs": 0}, histories={"epochs": 0})
    monkeypatch.setenv("RAYGREC_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["raygrec", "train", str(file), "--local", "train.lr=1e30"])
    with pytest.raises(RuntimeError, match="train: the loss is"):
        cli.main()


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(raygrec, trained, tiny_store, tiny_backbone, tmp_path):
    file, out = config_file(tmp_path, tiny_store, tiny_backbone)
    process = subprocess.Popen(
        [sys.executable, "-m", "raygrec.cli", "train", file, "--local"], stderr=subprocess.PIPE, text=True
    )
    # Ctrl-C once training has begun.
    deadline = time.monotonic() + 60
    while not list((out / "checkpoints").glob("alignment-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode != 0:  # else it was faster than the signal
        assert process.returncode == 1
        assert one_line(error).startswith("raygrec: interrupted")
    code, output, _ = raygrec("train", file, "--local", "--resume", "--json")
    assert code == 0
    finished = RunFolder(trained[1]).metrics()
    assert json.loads(output.splitlines()[-1])["test"] == finished["test"]
    assert [record["loss"] for record in RunFolder(out).history()] == [
        record["loss"] for record in RunFolder(trained[1]).history()
    ]


def test_help_and_version(raygrec):
    for command in ("demo", "prepare", "train", "evaluate", "recommend"):
        assert raygrec(command, "--help")[0] == 0
    assert raygrec("version")[1].strip()
