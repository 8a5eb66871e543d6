"""Configs: pydantic models that refuse unknown keys, YAML files, and `key.sub=value` overrides."""

import difflib
import re
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raygrec.errors import InputError


class StrictConfig(BaseModel):
    """A config section: immutable; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    return f"key '{key}': {message} (got {first['input']!r})" if key else message


def nearest_key(key: str, known: list[str]) -> str:
    """The end of a message about an unknown key, with the known one that is most like it."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
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
        annotation = field.annotation
        # A section that may be left out is `X | None`.
        for kind in get_args(annotation) if isinstance(annotation, UnionType) else [annotation]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
