"""Does to runs on real local Ray nodes what happens to clusters, and compares how they end.

python -m tests.faults                       # all rows, one seed each
python -m tests.faults node-lost --seeds 5   # one row, at five random updates
"""

import argparse
import json
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.home import HOME  # before Ray and torch are imported
from tests.faults.rows import ROWS
from tests.faults.scene import Scene, World


@dataclass
class Result:
    """One line of the table."""

    row: str
    seed: int
    done: list[str]
    after: list[int]
    """Updates before each fault."""
    metrics: list[str]
    """Of the run and of the uninterrupted one."""
    equal: list[str]
    lost: float | None
    """Seconds from each fault until the run was past it again, added up."""
    took: float
    verdict: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=1, help="tries of each row, at random updates of their own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table; what holds there is not tried again")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the table so far is shown, and the nodes end
    results = held(options.json)
    world = World(HOME)
    try:
        for name in options.rows or ROWS:
            for seed in range(options.seeds):
                if any((one.row, one.seed) == (name, seed) for one in results):
                    continue
                results.append(tried(world, name, seed))
                print(f"{name} (seed {seed}): {results[-1].verdict}, {results[-1].took:.0f} s", file=sys.stderr)
                if options.json:
                    options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    finally:
        world.close()
        shown(results)
    failed = any(result.verdict != "holds" for result in results)
    if not failed:
        shutil.rmtree(HOME, ignore_errors=True)
    return int(failed)


def held(file: Path | None) -> list[Result]:
    """What an earlier call has found to hold."""
    if file is None or not file.exists():
        return []
    return [result for one in json.loads(file.read_text()) if (result := Result(**one)).verdict == "holds"]


def tried(world: World, name: str, seed: int) -> Result:
    scene, begun = Scene(world, HOME / f"{name}-{seed}", seed, name), time.monotonic()
    verdict = "holds"
    try:
        ROWS[name](scene)
        if not scene.comparisons or not all(one.holds for one in scene.comparisons):
            verdict = "FAILS: the run ended otherwise than the uninterrupted one"
    except Exception as error:
        (scene.place / "error.log").write_text(traceback.format_exc())
        verdict = f"FAILS: {' '.join(str(error).split()) or type(error).__name__} ({scene.place})"
    finally:
        scene.clean()
    lost = [hit.back - hit.at for hit in scene.hits if hit.back]
    return Result(
        row=name,
        seed=seed,
        done=[hit.what for hit in scene.hits],
        after=[hit.step for hit in scene.hits],
        metrics=[f"{one.figure} {one.found:.6f} / {one.expected:.6f}" for one in scene.comparisons],
        equal=["to the bit" if one.identical else f"{one.difference:.1e}" for one in scene.comparisons],
        lost=sum(lost) if len(lost) == len(scene.hits) else None,
        took=time.monotonic() - begun,
        verdict=verdict,
    )


def shown(results: list[Result]) -> None:
    table = Table(title="Faults, and how the runs ended beside uninterrupted ones", show_lines=True)
    for column in ("row", "done", "after update", "metrics, uninterrupted", "equal", "lost, s", "verdict"):
        table.add_column(column)
    for one in results:
        table.add_row(
            one.row,
            "\n".join(one.done),
            "\n".join(map(str, one.after)),
            "\n".join(one.metrics),
            "\n".join(one.equal),
            "" if one.lost is None else f"{one.lost:.1f}",
            one.verdict,
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    sys.exit(main())
