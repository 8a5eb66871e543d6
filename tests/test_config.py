from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from raygrec.config import StrictConfig, apply_overrides, read_yaml, validate
from raygrec.errors import InputError


class Engine(StrictConfig):
    precision: str = "fp32"
    zero_stage: int = Field(2, ge=0, le=3)


class Track(StrictConfig):
    address: str = "here"


class Pair(StrictConfig):
    side: Literal["user", "item"]


class Values(StrictConfig):
    """All kinds of fields that a number, or true and false, may stand in."""

    count: int = Field(1, ge=1)
    share: float | None = Field(None, ge=0, lt=1)
    stage: Literal[0, 1, 2] = 2
    betas: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    flag: bool = False
    any: float | int | str | bool | None = None
    points: dict[str, int | bool | tuple[float | bool, ...]] = Field(default_factory=dict)


class Run(StrictConfig):
    store: str
    seed: int = 0
    rate: float = 0.1
    ks: tuple[int, ...] = (5, 10)
    engine: Engine = Engine()
    track: Track | None = None
    values: Values | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        if self.seed == 13:
            raise ValueError("seed 13 with this store: use another")
        return self


def written(tmp_path, content: str | bytes):
    file = tmp_path / "run.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_a_file_becomes_a_config(tmp_path):
    content = read_yaml(written(tmp_path, "store: books\nks: [1, 20]\nengine:\n  zero_stage: 3\n"))
    run = validate(Run, content, "run.yaml")
    assert run == Run(store="books", ks=(1, 20), engine=Engine(zero_stage=3))
    with pytest.raises(ValidationError):
        run.seed = 1


@pytest.mark.parametrize(
    ("content", "key", "nearest"),
    [
        ({"store": "s", "sed": 1}, "sed", "seed"),
        ({"store": "s", "engin": {}}, "engin", "engine"),
        ({"store": "s", "engine": {"zero_stge": 1}}, "engine.zero_stge", "engine.zero_stage"),
        ({"store": "s", "precision": "bf16"}, "precision", "engine.precision"),
        ({"store": "s", "track": {"adress": "there"}}, "track.adress", "track.address"),
        ({"store": "s", "track": {"x": 1}}, "track.x", "track.address"),  # not the section that it stands in
        ({"store": "s", "engine": {"precision": "bf16", "x": 1}}, "engine.x", "engine.precision"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(content, key, nearest):
    with pytest.raises(InputError) as error:
        validate(Run, content, "run.yaml")
    assert str(error.value) == f"run.yaml: unknown key '{key}'; the nearest known key is '{nearest}'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "run.yaml: key 'store' is missing"),
        ({"store": "s", "seed": "many"}, "run.yaml: key 'seed': Input should be a valid integer"),
        (
            {"store": "s", "engine": {"zero_stage": 4}},
            "run.yaml: key 'engine.zero_stage': Input should be less",
        ),
        ({"store": "s", "ks": [5, "x"]}, "run.yaml: key 'ks.1': Input should be a valid integer"),
        (
            {"store": "s", "engine": 3},
            "run.yaml: key 'engine': expected a section of keys (precision, zero_stage), or {} for its defaults",
        ),
        (
            {"store": "s", "track": "there"},
            "run.yaml: key 'track': expected a section of keys (address), {} for its defaults, or null (got 'there')",
        ),
        (
            {"store": "s", "values": [1]},
            "run.yaml: key 'values': expected a section of keys (count, share, stage, betas, counts, …), {} for its "
            "defaults, or null (got [1])",
        ),
        (
            {"store": "s", "values": {"pairs": [{"side": "user"}, 3]}},
            "run.yaml: key 'values.pairs.1': expected a section of keys (side) (got 3)",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key(content, message):
    with pytest.raises(InputError) as error:
        validate(Run, content, "run.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"count": True}, "count", "expected a whole number (got True)"),
        ({"count": False}, "count", "expected a number (got False)"),
        ({"share": False}, "share", "expected a number (got False)"),
        ({"share": True}, "share", "expected a number (got True)"),
        ({"stage": True}, "stage", "expected a whole number (got True)"),
        ({"betas": [0.5, True]}, "betas.1", "expected a number (got True)"),
        ({"counts": {"a": 1, "b": False}}, "counts.b", "expected a whole number (got False)"),
    ],
)
def test_true_and_false_are_no_numbers(values, key, message):
    with pytest.raises(InputError) as error:
        validate(Run, {"store": "s", "values": values}, "run.yaml")
    assert str(error.value) == f"run.yaml: key 'values.{key}': {message}"
    with pytest.raises(ValidationError):
        Values(**values)


def test_true_and_false_are_taken_where_they_are_wanted():
    points = {"a": True, "b": 1, "c": [False, 0.5]}
    values = validate(Values, {"flag": True, "any": False, "points": points, "count": 3}, "run.yaml")
    assert (values.flag, values.any, values.points) == (True, False, {"a": True, "b": 1, "c": (False, 0.5)})
    assert type(values.points["b"]) is int
    assert type(values.any) is type(values.points["a"]) is bool


def test_a_rule_over_several_keys_speaks_for_itself():
    with pytest.raises(InputError, match=r"^run\.yaml: seed 13 with this store: use another$"):
        validate(Run, {"store": "s", "seed": 13}, "run.yaml")


def test_overrides_set_keys_and_leave_the_given_content_alone():
    content = {"store": "books", "engine": {"zero_stage": 1, "precision": "fp32"}, "nothing": None}
    changed = apply_overrides(
        content, ["engine.zero_stage=0", "ks=[1, 2]", "rate=1e-3", "store=a=b", "nothing.a.b=true"]
    )
    assert changed == {
        "store": "a=b",
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "ks": [1, 2],
        "rate": 1e-3,  # as in YAML 1.2; in YAML 1.1 it is a word
        "nothing": {"a": {"b": True}},
    }
    assert content == {"store": "books", "engine": {"zero_stage": 1, "precision": "fp32"}, "nothing": None}
    del changed["nothing"]
    assert validate(Run, changed, "overrides").rate == 1e-3


def test_numbers_with_an_exponent_are_numbers_and_words_stay_words(tmp_path):
    numbers = {"1e-3": 1e-3, "-2.5E3": -2500.0, ".5e1": 5.0, "1_0e2": 1000.0, "1.5e+3": 1500.0}
    words = ["1e", "e3", "1e-3s", "0x1e3g", "v1e3"]
    lines = [f"- {text}" for text in [*numbers, *words]]
    assert read_yaml(written(tmp_path, "a:\n" + "\n".join(lines)))["a"] == [*numbers.values(), *words]


class Table(StrictConfig):
    column: str = "user"
    template: str | None = None
    items: Path | None = None
    k_core: int = 5


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("template={title}", "{title}"),
        ("template=Title: {title}", "Title: {title}"),
        ("template={title}. {categories}", "{title}. {categories}"),
        ("column=|", "|"),
        ("column=>", ">"),
        ("column= ", " "),
        ("column=#", "#"),
        ("column=@u", "@u"),
        ("column=2014", "2014"),
        ("column='", "'"),
        ("column='2014'", "2014"),
        ('template="{title}"', "{title}"),
        ('template="{title}": {categories}', '"{title}": {categories}'),
        ("template=null", None),
        ("template=", None),
        ("items=2014", Path("2014")),
        ("items=~", None),
        ("k_core=3", 3),
    ],
)
def test_text_is_taken_as_it_is_typed_where_the_model_is_known(override, value):
    given = apply_overrides({}, [override], Table)
    assert getattr(validate(Table, given, "overrides"), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("seed.low=3", "'seed' is a value, not a section"),
        ("engine.zero_stage.low=3", "'zero_stage' is a value, not a section"),
        ("ks=[1", "'[1' is not a YAML value"),
        ("store=2024-13-45", "'2024-13-45' is not a YAML value"),
        ("store=!!python/object/apply:os.getcwd []", "is not a YAML value"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(InputError) as error:
        apply_overrides({"seed": 0, "engine": {"zero_stage": 0}}, [override])
    assert str(error.value).startswith(f"override '{override}': ")
    assert str(error.value).endswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3: not valid YAML"),
        ("a: 1\nb: !!python/object/apply:os.system [echo]\n", "line 2: not valid YAML: could not determine"),
        ("a: 1\nb: !!python/name:os.system\n", "line 2: not valid YAML: could not determine"),
        ("a: 2024-13-45\n", "not valid YAML: month must be"),
        ("a: \0\n", "not valid YAML: unacceptable character"),
        ("- a\n- b\n", "expected a mapping of keys to values"),
        ("", "expected a mapping of keys to values"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    file = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_yaml(file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"missing\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path)
