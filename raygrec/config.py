"""Configs: pydantic models that refuse unknown keys, YAML files, and `key.sub=value` overrides."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raygrec.errors import InputError


class StrictConfig(BaseModel):
    """A config section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=StrictConfig)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping with the safe loader; `InputError` names the line of a syntax error."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "tags are not allowed, plain values only"
        raise InputError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values at the top")
    return content


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns `content` with each `key.sub=value` set; values are read as YAML scalars or lists."""
    result = {**content}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"override '{override}': expected key.sub=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"override '{override}': '{value}' is not a YAML value") from None
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent) or {}
            if not isinstance(child, dict):
                raise InputError(f"override '{override}': '{parent}' is a value, not a section")
            node[parent] = node = {**child}
        node[leaf] = parsed
    return result


def validate(model: type[C], content: dict[str, Any], source: str) -> C:
    """Builds `model` from `content`; `InputError` names `source`, the first wrong key and the nearest known one."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(model, error)}") from None


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_known_keys(model))
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"unknown key '{key}'; the nearest known key is '{nearest[0]}'" if nearest else f"unknown key '{key}'"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    return f"key '{key}': {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
