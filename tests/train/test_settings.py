import pytest

from raygrec.errors import InputError
from raygrec.train.settings import ClusterConfig, GALRecRun, GLTARun, GraphRun, SequentialRun, run_config

PLACES = {"store": "s", "out": "o"}
KNOWN = "glta, galrec, sequential, graph"


def refused(content: dict[str, object]) -> str:
    """The one line that a config is refused with."""
    with pytest.raises(InputError) as caught:
        run_config({**PLACES, **content}, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, GLTARun),
        ({"recipe": "glta"}, GLTARun),
        ({"recipe": "galrec"}, GALRecRun),
        ({"recipe": "sequential"}, SequentialRun),
        ({"recipe": "graph"}, GraphRun),
    ],
)
def test_the_recipe_picks_the_config(content, expected):
    config = run_config({**PLACES, **content}, "run.yaml")
    assert type(config) is expected
    assert run_config(config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize("recipe", ["GAL-Rec", "", None, 3, ["glta"], {"glta": 1}])
def test_an_unknown_recipe_is_refused(recipe):
    assert refused({"recipe": recipe}) == f"run.yaml: key 'recipe': expected one of {KNOWN} (got {recipe!r})"


@pytest.mark.parametrize(
    ("recipe", "content", "key"),
    [
        ("galrec", {"alignment": {"epochs": 1}}, "alignment"),
        ("galrec", {"histories": {"epochs": 1}}, "histories"),
        ("galrec", {"model": {"slots": 3}}, "model.slots"),
        ("glta", {"model": {"neighbours": {}}}, "model.neighbours"),
        ("sequential", {"model": {"contrast": {}}}, "model.contrast"),
        ("sequential", {"histories": {"epochs": 1}}, "histories"),
        ("graph", {"model": {"dim": 8}}, "model"),
    ],
)
def test_a_key_of_the_other_recipe_is_refused(recipe, content, key):
    assert f"unknown key '{key}'; the nearest known key is" in refused({"recipe": recipe, **content})


@pytest.mark.parametrize("weight", ["l1", "l2", "l3"])
def test_pairs_of_one_weight_on_two_sides_are_refused(weight):
    """A weight is a term, and a term is a mean over the nodes of one side."""
    pairs = [
        {"side": "user", "anchor": 0, "positive": 1, "weight": weight},
        {"side": "item", "anchor": 0, "positive": 1, "weight": weight},
    ]
    message = refused({"recipe": "galrec", "model": {"contrast": {"pairs": pairs}}})
    assert f"key 'model.contrast': pairs: those of {weight} must all be of users or all of items" in message
    pairs[1]["side"] = "user"
    assert (
        len(
            run_config(
                {**PLACES, "recipe": "galrec", "model": {"contrast": {"pairs": pairs}}}, "x"
            ).model.contrast.pairs
        )
        == 2
    )


@pytest.mark.parametrize("hop", [-1, 3])
def test_a_pair_of_a_hop_that_no_prompt_has_is_refused(hop):
    pairs = [{"side": "user", "anchor": 0, "positive": hop, "weight": "l1"}]
    assert "'model.contrast.pairs.0.positive'" in refused({"recipe": "galrec", "model": {"contrast": {"pairs": pairs}}})


def test_the_pairs_that_weigh_something():
    contrast = run_config({**PLACES, "recipe": "galrec", "model": {"contrast": {"l1": 0}}}, "x").model.contrast
    assert [(pair.anchor, pair.positive, pair.weight) for pair in contrast.active("user")] == [(1, 2, "l2")]
    assert [(pair.anchor, pair.positive, pair.weight) for pair in contrast.active("item")] == [
        (0, 2, "l3"),
        (1, 2, "l3"),
    ]


def test_galrec_has_no_slots_to_decode():
    message = refused({"recipe": "galrec", "evaluate": {"decoding": "slots"}})
    assert message == (
        "run.yaml: evaluate.decoding=slots: GAL-Rec answers at one position; use first or autoregressive"
    )
    for decoding in ("first", "autoregressive"):
        run_config({**PLACES, "recipe": "galrec", "evaluate": {"decoding": decoding}}, "x")


def test_glta_needs_a_slot_for_each_item_of_a_list():
    content = {"evaluate": {"decoding": "slots", "ks": [5, 10]}, "model": {"slots": 9}}
    assert "model.slots is 9, lists of 10 need as many" in refused(content)
    run_config({**PLACES, **content, "model": {"slots": 10}}, "x")


def test_a_recipe_that_trains_has_an_epoch_and_something_to_measure():
    assert "train.epochs=0: recipe galrec trains for one epoch" in refused({"recipe": "galrec", "train": {"epochs": 0}})
    run_config({**PLACES, "recipe": "graph", "train": {"epochs": 0}}, "x")
    for ks in ([], [5, 0]):
        assert "key 'evaluate.ks" in refused({"evaluate": {"ks": ks}})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {"width": 9}}, "key 'model': width 9 is not a multiple of heads 2"),
        ({"model": {"filter": "fft"}}, "'model.filter'"),
        ({"model": {"alpha": 1.5}}, "'model.alpha'"),
        ({"model": {"cutoff": 0}}, "'model.cutoff'"),
        ({"evaluate": {"decoding": "slots"}}, "evaluate.decoding=slots: SASRec-CE answers at one position"),
    ],
)
def test_what_a_sequential_model_cannot_be(content, problem):
    assert problem in refused({"recipe": "sequential", **content})


SHARED = {"text_vectors": True, "successors": {"alike": 2}}
OURS = {"graph_vectors": False, "contrast": {"l1": 0.0, "l2": 0.0, "l3": 0.0}, "successors": {"alike": 2}}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"recipe": "glta"}, "GLTA"),
        ({"recipe": "galrec"}, "GAL-Rec"),
        ({"recipe": "sequential"}, "SASRec-CE"),
        ({"recipe": "sequential", "model": {"text_vectors": True}}, "SASRec-CE + text"),
        ({"recipe": "sequential", "model": {"filter": "frequency"}}, "BSARec-like"),
        ({"recipe": "galrec", "model": {"successors": {}}}, "GAL-Rec + successors"),
        ({"recipe": "galrec", "text_tuning": {}}, "GAL-Rec + tuned texts"),
        ({"recipe": "galrec", "text_tuning": {}, "model": {"text_vectors": False}}, "GAL-Rec"),
        ({"recipe": "galrec", "model": OURS}, "GAL-Rec, texts and shared successors"),
        ({"recipe": "galrec", "model": OURS, "text_tuning": {}}, "GAL-Rec, tuned texts and shared successors"),
        ({"recipe": "sequential", "model": SHARED, "text_tuning": {}}, "SASRec-CE + tuned text + shared successors"),
        ({"recipe": "graph"}, "LightGCN"),
        ({"recipe": "graph", "graph": {"text_weight": 0.1}}, "RLMRec-Con"),
    ],
)
def test_names_in_tables(content, name):
    assert run_config({**PLACES, **content}, "x").name == name


@pytest.mark.parametrize(("given", "fewest", "most"), [(3, 3, 3), ([1, 4], 1, 4), ([2, 2], 2, 2)])
def test_workers_are_a_number_or_a_range(given, fewest, most):
    cluster = ClusterConfig(workers=given)
    assert (cluster.fewest, cluster.most) == (fewest, most)
    assert ClusterConfig(**cluster.model_dump(mode="json")) == cluster


@pytest.mark.parametrize("given", [0, True, [0, 2], [3, 2], [1, 2, 3], [1.5, 2], "two"])
def test_workers_that_no_run_can_have(given):
    message = refused({"cluster": {"workers": given}})
    assert message.startswith("run.yaml: key 'cluster.workers': expected a number of workers, or [fewest, most]")


@pytest.mark.parametrize("recipe", ["galrec", "sequential"])
def test_likes_need_texts(recipe):
    content = {"recipe": recipe, "model": {"text_vectors": False, "successors": {"alike": 5}}}
    assert "successors.alike=5 asks for text_vectors=true: it is texts that are alike" in refused(content)
