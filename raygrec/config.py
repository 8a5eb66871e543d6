"""Configs: pydantic models that refuse unknown keys, YAML files, and `key.sub=value` overrides."""

import difflib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from raygrec.errors import InputError

NAMED = 5  # keys of a section, at most, that a message names
BOUNDS = {"ge", "gt", "le", "lt"}


class StrictConfig(BaseModel):
    """A config section: immutable; an unknown key is an error, and so is a number that is not finite, or true or false
    where a number is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _truths_are_no_numbers(cls, given: Any, make: ValidatorFunctionWrapHandler) -> Any:
        made = make(given)
        if wrong := list(_truths_as_numbers(given, made)):
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return made


def _truths_as_numbers(given: Any, made: Any, place: tuple[int | str, ...] = ()) -> Iterator[InitErrorDetails]:
    if isinstance(given, bool) and isinstance(made, int | float) and not isinstance(made, bool):
        wanted = "a whole number" if isinstance(made, int) else "a number"
        yield InitErrorDetails(type=PydanticCustomError("truth", f"expected {wanted}"), loc=place, input=given)
    elif isinstance(given, dict) and isinstance(made, dict):
        for key, value in given.items():
            yield from _truths_as_numbers(value, made.get(key), (*place, key))
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple):
        for number, values in enumerate(zip(given, made, strict=False)):
            yield from _truths_as_numbers(*values, (*place, number))


C = TypeVar("C", bound=StrictConfig)


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 1e-3 and 1.5e3 are numbers, as in YAML 1.2: in YAML 1.1 they are words."""


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says; raises `yaml.YAMLError`, and ValueError for a date that is none."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping with the safe loader; `InputError` names the line of a syntax error."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{where}: not valid YAML: {problem}") from None
    except ValueError as error:  # a date or number that only looks like one
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values at the top")
    return content


def apply_overrides(
    content: dict[str, Any], overrides: list[str], model: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Returns `content` with each `key.sub=value` set; values are read as YAML scalars or lists.

    model: what the content is for; its own keys that hold text or a path then take a value as it is typed.
    """
    result = {**content}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"override '{override}': expected key.sub=value")
        try:
            parsed = _as_typed(value) if model and _takes_text(model, key) else parse_yaml(value)
        except (yaml.YAMLError, ValueError):
            raise InputError(f"override '{override}': '{value}' is not a YAML value") from None
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent)
            child = {} if child is None else child
            if not isinstance(child, dict):
                raise InputError(f"override '{override}': '{parent}' is a value, not a section")
            node[parent] = node = {**child}
        node[leaf] = parsed
    return result


def _takes_text(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and field.annotation in (str, str | None, Path, Path | None)


def _as_typed(value: str) -> str | None:
    """The text itself; where it is null or in quotes, what YAML makes of it."""
    if value in ("", "null", "~"):
        return None
    with suppress(yaml.YAMLError, ValueError):
        if value[0] in "'\"" and isinstance(parsed := parse_yaml(value), str):
            return parsed
    return value


def validate(model: type[C], content: dict[str, Any], source: str) -> C:
    """Builds `model` from `content`; `InputError` names `source`, the first wrong key and the nearest."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(model, error)}") from None


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest_key(key, known_keys(model))}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = _section_wanted(model, first["loc"])
    elif isinstance(first["input"], bool) and BOUNDS & first.get("ctx", {}).keys():
        message = "expected a number"
    return f"key '{key}': {message} (got {first['input']!r})" if key else message


def _section_wanted(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """What is right where something else than a section was given."""
    kinds: list[Any] = [model]
    for part in place:
        kinds = next(_inside(kind, part) for kind in kinds if _inside(kind, part))
    section = next(kind for kind in kinds if _is_section(kind))
    names = list(section.model_fields)
    choices = [f"a section of keys ({', '.join([*names[:NAMED], *['…'] * (len(names) > NAMED)])})"]
    with suppress(ValidationError):
        section()
        choices.append("{} for its defaults")
    choices += ["null"] * (type(None) in kinds)
    return f"expected {', '.join(choices[:-1])}{', or ' * (len(choices) > 1)}{choices[-1]}"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kinds(annotation: Any) -> list[Any]:
    """What a value may be: a section that may be left out is `X | None`."""
    return list(get_args(annotation)) if isinstance(annotation, UnionType) else [annotation]


def _inside(kind: Any, part: int | str) -> list[Any]:
    """What stands at a key of a section or mapping, or at a place of a tuple."""
    if _is_section(kind):
        return _kinds(kind.model_fields[part].annotation)
    values = get_args(kind)
    return _kinds(values[get_origin(kind) is dict]) if values else []


def nearest_key(key: str, known: list[str]) -> str:
    """The end of a message about an unknown key, with the known one that is most like it, but no section around it."""
    around = {one for one in known if key.startswith(f"{one}.") and any(k.startswith(f"{one}.") for k in known)}
    nearest = difflib.get_close_matches(key, [one for one in known if one not in around], n=1, cutoff=0.0)
    return f"; the nearest known key is '{nearest[0]}'" if nearest else ""


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a config, dotted, those of sections and their sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in _kinds(field.annotation):
            if _is_section(kind):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
