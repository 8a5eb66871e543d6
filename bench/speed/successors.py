"""Row 9: what successors, by themselves and shared among items of like texts, add to a training step."""

from bench.speed.measure import compared, in_turns, write
from bench.speed.ready import FEW, beauty, ready

ROUNDS = 7
ALONE = "texts alone"


def main() -> None:
    store = beauty()
    sides = {
        ALONE: ready("galrec-texts.yaml", store, "galrec-texts", FEW),
        "with successors": ready("galrec-successors.yaml", store, "galrec-successors", FEW),
        # Texts of a tuned language model are read once, before: a step is the same.
        "with shared successors": ready("galrec-shared.yaml", store, "galrec-shared", FEW, "text_tuning=null"),
    }
    runs = {name: lambda number, one=one: one.step(one.users(number), number) for name, one in sides.items()}
    seconds = in_turns(runs, ROUNDS)
    write(
        "successors",
        {
            "row": 9,
            "title": "A training step of GAL-Rec with successors, by themselves and shared (Amazon Beauty)",
            "against": "the same users with texts alone, under `raygrec`; with successors, under `other`",
            "target": "stated",
            "reached": True,
            "cases": [compared(name, seconds, ALONE, name) for name in sides if name != ALONE],
        },
    )
