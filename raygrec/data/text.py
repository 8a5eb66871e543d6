"""What an item says in words: cleaned text, the filled template, and its terms."""

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from string import Formatter

from raygrec.data.arrays import CSR, Strings
from raygrec.errors import InputError

TEMPLATE_FIELDS = ("title", "categories", "description")
_DESCRIPTION_LIMIT = 1000  # characters; models read far fewer
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_WORD = re.compile(r"[^\W\d_][\w'’-]+")
_COMMON = """
    a an and are as at be by for from how in into is it its my new no not of off on or our out over
    pack part set that the their this to up vol volume book edition with without you your
"""
_COMMON_WORDS = frozenset(_COMMON.split())
_remembered = lru_cache(maxsize=1 << 16)  # words and categories recur from item to item


@dataclass(frozen=True, slots=True)
class Item:
    """An item as its source describes it.

    categories: paths from root to leaf; a flat label such as a genre is a path of one.
    """

    id: str
    title: str = ""
    categories: tuple[tuple[str, ...], ...] = ()
    description: str = ""


def make_item(
    item_id: str,
    title: str | None,
    categories: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
    description: str | None = "",
) -> Item:
    """An `Item` of cleaned text, without empty names and without repeated paths.

    categories: paths from root to leaf, or one path, or a name alone. `TypeError` names what is of another type.
    """
    for key, text in (("id", item_id), ("title", title or ""), ("description", description or "")):
        if not isinstance(text, str):
            raise TypeError(f"{key}: expected text, found {text!r}")
    return Item(
        id=item_id,
        title=clean(title or ""),
        categories=_cleaned(_paths(categories or ())),
        description=clean((description or "")[: 4 * _DESCRIPTION_LIMIT])[:_DESCRIPTION_LIMIT],
    )


def _paths(categories: str | Sequence[str] | Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    path = [categories] if isinstance(categories, str) else categories
    paths = [path] if _is_path(path) else path
    if not isinstance(paths, list | tuple) or not all(map(_is_path, paths)):
        raise TypeError(f"categories: expected a list of paths, each a list of names, found {categories!r}")
    return tuple(map(tuple, paths))


def _is_path(names: object) -> bool:
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def clean(text: str) -> str:
    """Unescapes HTML entities (twice: some are escaped twice), drops tags, and joins runs of blanks."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    return " ".join(text.split())


@_remembered
def _cleaned(paths: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    cleaned = (tuple(filter(None, map(clean, path))) for path in paths)
    return tuple(dict.fromkeys(filter(None, cleaned)))


def check_template(template: str) -> str:
    """Returns `template`; `InputError` unless it is made of `{title}`, `{categories}` and `{description}`."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"text_template '{template}': {error}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    wrong = [name for name in names if name not in TEMPLATE_FIELDS]
    plain = all(not spec and not conversion for _, _, spec, conversion in parts)
    if wrong or not names or not plain:
        known = ", ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS)
        raise InputError(f"text_template '{template}': expected text with fields out of {known}")
    return template


def has_text(template: str, item: Item) -> bool:
    """Whether the item has any of the fields that the template names."""
    return any(getattr(item, name) for _, name in _parts(template) if name is not None)


def fill_template(template: str, item: Item) -> str:
    """The template with the item's fields; an empty field goes together with the words before it."""
    values = {"title": item.title, "categories": _listed(item.categories), "description": item.description}
    text = ""
    for literal, name in _parts(template):
        if name is not None and not values[name]:
            continue
        text += literal if text else literal.lstrip(" .,;:")
        text += values[name] if name is not None else ""
    return text.strip() or item.id


@_remembered
def _listed(categories: tuple[tuple[str, ...], ...]) -> str:
    return ", ".join(dict.fromkeys(chain.from_iterable(categories)))


@_remembered
def _parts(template: str) -> list[tuple[str, str | None]]:
    return [(literal, name) for literal, name, _, _ in Formatter().parse(template)]


def item_terms(items: Sequence[Item]) -> tuple[CSR, Strings]:
    """The terms of each item and their vocabulary.

    A row lists category names from leaf to root, path by path, then title words; a term stands where it
    occurs first. A title word of one item alone is left out: it tells nothing about another. Upper and lower
    case are one term, written as it is seen first.
    """
    words = [_title_words(item.title) for item in items]
    frequency = Counter(chain.from_iterable(words))
    numbers = _Numbers()
    rows = []
    for item, title_words in zip(items, words, strict=True):
        found = [*_leaf_to_root(item.categories)]
        found += [word for word in title_words if frequency[word] > 1 or word in numbers]
        rows.append(tuple(dict.fromkeys(map(numbers.__getitem__, found))))
    return CSR.from_lists(rows), Strings.from_list(numbers.names)


@_remembered
def _leaf_to_root(categories: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(name for path in categories for name in reversed(path))


class _Numbers(dict):
    """Numbers names from 0 as they are asked for; names: as each is seen first."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __missing__(self, name: str) -> int:
        folded = name.casefold()
        if folded not in self:
            self[folded] = len(self.names)
            self.names.append(name)
        self[name] = self[folded]
        return self[name]


def _title_words(title: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(_term, _WORD.findall(title.casefold())))))


@_remembered
def _term(word: str) -> str:
    """Without marks at its ends; nothing where it tells nothing."""
    word = word.strip("-'’")
    return word if len(word) > 2 and word not in _COMMON_WORDS else ""
