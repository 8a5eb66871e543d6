"""The command line: parse, call, print. Exit codes: 0 done, 1 failed while running, 2 wrong input."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from raygrec import __version__
from raygrec.config import apply_overrides, read_yaml, validate
from raygrec.errors import InputError
from raygrec.remote import refuse_address

if TYPE_CHECKING:
    from raygrec.train.settings import ClusterConfig

T = TypeVar("T")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

INTERRUPTED = 130  # what typer ends with after Ctrl-C
TERMINATED = 143  # what shells say of a process that SIGTERM ended

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, as key.sub=value")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as one JSON document on the last line")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or the address of a finished run")]
OnRay = Annotated[bool, typer.Option("--ray", help="as one task of the cluster that RAY_ADDRESS names")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the store and the runs go; must not exist")] = Path("raygrec-demo"),
    as_json: AsJson = False,
) -> None:
    """Makes a small data set, trains GLTA and GAL-Rec on two Ray Train workers and shows what came of it."""
    refuse_address(out, "name a path")
    from raygrec.cluster.demo import run_demo

    result = run_demo(out)
    _print(result, as_json)


@app.command()
def prepare(
    format: Annotated[str, typer.Argument(help="amazon, movielens, yelp, goodreads, sequences or table")],
    path: Annotated[Path, typer.Argument(help="the source's folder or file")],
    out: Annotated[Path, typer.Option(help="the store's folder")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Turns raw interactions and item texts into a store."""
    from raygrec.data.prepare import PrepareOptions
    from raygrec.data.prepare import prepare as make

    for place in (path, out):
        refuse_address(place, "prepare from and to a path, and copy the finished store to its address")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that no draft of the store stays
    given = apply_overrides({"format": format, "path": str(path), "out": str(out)}, overrides or [], PrepareOptions)
    store = make(validate(PrepareOptions, given, "prepare"))
    counts = {split: len(store.interactions(split).indices) for split in ("train", "valid", "test")}
    result = {"store": str(store.path), "users": store.num_users, "items": store.num_items, **counts}
    if not as_json:
        print(f"{store.path}: {store.num_users:,} users, {store.num_items:,} items, ", end="")
        print(", ".join(f"{count:,} {split}" for split, count in counts.items()))
    _print(result, as_json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a run config, see jobs/")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="go on with the run that `out` holds")] = False,
    local: Annotated[bool, typer.Option(help="in this one process, without Ray and DeepSpeed")] = False,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="stop at what the store keeps for its runs, such as LightGCN's nodes")
    ] = False,
    on_ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Trains a recommender on Ray Train workers, evaluates it and writes the run folder."""
    from raygrec.train.settings import run_config

    checked = run_config(apply_overrides(read_yaml(config), overrides or []), str(config))
    if prepare_only:
        from raygrec.train.assembly import prepare_only as make
        from raygrec.train.folder import with_absolute_paths

        store = _run_once(on_ray, checked.cluster, make, with_absolute_paths(checked))
        if not as_json:
            print(f"{store}: ready for {checked.name}")
        return _print({"store": str(store)}, as_json)
    if on_ray:
        raise InputError("--ray: training does so by itself; this option is for --prepare-only")
    if local:
        from raygrec.train.local import train_here as run
    else:
        from raygrec.cluster.launcher import train_on_ray as run
    metrics = run(checked, resume)
    _show_metrics(metrics, checked.out, as_json)


@app.command()
def tune(
    space: Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="a search space, see tune_spaces/")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="go on with the sweep that `out` holds")] = False,
    final_seeds: Annotated[int, typer.Option(min=0, help="seeds that the best is trained with and read on test")] = 0,
    as_json: AsJson = False,
) -> None:
    """Searches settings with Ray Tune, by validation alone; overrides are of the sweep's keys or of its job's."""
    from raygrec.cluster.space import read_sweep
    from raygrec.cluster.sweep import run_sweep

    result = run_sweep(read_sweep(space, overrides or []), resume, final_seeds)
    if not as_json:
        _show_sweep(result)
    _print(result, as_json)


@app.command()
def evaluate(
    run: Run,
    decoding: Annotated[str | None, typer.Option(help="first, slots or autoregressive; default: the run's")] = None,
    on_ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Repeats a finished run's validation and test metrics from its folder and store."""
    from raygrec.serve.topk import evaluate_run

    if decoding not in (None, "first", "slots", "autoregressive"):
        raise InputError(f"--decoding {decoding}: expected first, slots or autoregressive")
    _show_metrics(_run_once(on_ray, _cluster(run), evaluate_run, run, decoding), run, as_json)


@app.command()
def recommend(
    run: Run,
    k: Annotated[int, typer.Option("--k", help="items per user")] = 10,
    out: Annotated[Path, typer.Option(help="a parquet file")] = Path("recommendations.parquet"),
    on_ray: OnRay = False,
    as_json: AsJson = False,
) -> None:
    """Writes every user's top-k items with scores and titles."""
    from raygrec.serve.topk import recommend_all

    refuse_address(out, "name a path")
    rows = _run_once(on_ray, _cluster(run), recommend_all, run, k, out)
    if not as_json:
        print(f"{out}: {rows:,} rows")
    _print({"file": str(out), "rows": rows}, as_json)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a run config, see jobs/")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    gpu_type: Annotated[str, typer.Option(help="H100, H200, B200, A100-80, A100-40, L40S, L4 or A10G")] = "H100",
    price: Annotated[float | None, typer.Option(min=0, help="USD per hour and GPU")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of the datasheet's FLOP/s")] = 0.35,
    users: Annotated[int | None, typer.Option(min=1, help="where there is no store yet")] = None,
    items: Annotated[int | None, typer.Option(min=1)] = None,
    interactions: Annotated[int | None, typer.Option(min=1, help="to train on")] = None,
    as_json: AsJson = False,
) -> None:
    """Says what a run would need: parameters, memory per GPU under each ZeRO stage, speed, hours and cost."""
    from raygrec.train.accelerators import accelerator
    from raygrec.train.plan import plan as make
    from raygrec.train.plan import sizes_of, table
    from raygrec.train.settings import run_config

    gpu = accelerator(gpu_type)  # or an error, before a store is looked for
    checked = run_config(apply_overrides(read_yaml(config), overrides or []), str(config))
    found = make(checked, sizes_of(checked, users, items, interactions), gpus, gpu, price, mfu)
    if not as_json:
        print("\n".join(table(found)))
    _print(found, as_json)


@app.command()
def version() -> None:
    """Prints the version."""
    print(__version__)


def _run_once(on_ray: bool, cluster: "ClusterConfig", function: Callable[..., T], *arguments: object) -> T:
    """Calls `function` here, or as one task of the cluster."""
    if not on_ray:
        return function(*arguments)
    from raygrec.cluster.launcher import on_cluster

    return on_cluster(cluster, function, *arguments)


def _cluster(run: str) -> "ClusterConfig":
    from raygrec.train.folder import run_at

    return run_at(run).config().cluster


def _show_metrics(metrics: dict[str, Any], run: Path | str, as_json: bool) -> None:
    if not as_json:
        from rich.console import Console

        from raygrec.evaluate.tables import Row, terminal_table
        from raygrec.train.folder import run_at

        split = "test" if "test" in metrics else "valid"
        rows = [Row(name, [both[split]]) for name, both in metrics.get("baselines", {}).items()]
        rows.append(Row(run_at(run).config().name, [metrics[split]]))
        ks = sorted(int(name.partition("@")[2]) for name in metrics[split] if name.startswith("ndcg@"))
        shown = [f"{name}@{k}" for k in ks for name in ("precision", "ndcg", "hit")]
        Console().print(terminal_table(rows, title=f"{split}, full ranking", metrics=shown))
        print(f"run folder: {run}")
    _print(metrics, as_json)


def _show_sweep(result: dict[str, Any]) -> None:
    from rich.console import Console

    from raygrec.evaluate.tables import Row, terminal_table

    counts = [f"{result[name]} {name}" for name in ("finished", "pruned", "failed", "unfinished") if name in result]
    print(f"{result['trials']} trials: {', '.join(counts)}")
    if "best" in result:
        best = result["best"]
        settings = " ".join(f"{key}={value}" for key, value in best["point"].items())
        print(f"best: trial {best['trial']}, {best['score']:.4f}, {settings}")
        print(f"config: {best['config']}")
    if "final" in result:
        rows = [Row(name, runs["test"]) for name, runs in result["final"].items()]
        Console().print(terminal_table(rows, title="the best configuration, test, full ranking"))
    if "report" in result:
        print(f"report: {result['report']}")


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


def _fail(message: str, code: int) -> NoReturn:
    print(f"raygrec: {message}", file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: turns `InputError` into one line and exit code 2, any other failure into exit code 1.

    arguments: the command line; None reads the process's own. RAYGREC_DEBUG=1 shows the traceback of a failure.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before torch is imported: threads that spin while they wait slow a shared machine down many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(arguments, standalone_mode=True)
    except InputError as error:
        _fail(str(error), 2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _fail("interrupted; --resume goes on with a run that has begun to train", 1)
        raise
    except Exception as error:
        if os.environ.get("RAYGREC_DEBUG", "") not in ("", "0"):
            raise
        message = " ".join(str(error).split())
        # RuntimeErrors are sentences; of others, such as KeyError, the name says the most.
        if not isinstance(error, RuntimeError):
            message = f"{type(error).__name__}: {message} (RAYGREC_DEBUG=1 shows the traceback)"
        _fail(message, 1)


if __name__ == "__main__":
    main()
