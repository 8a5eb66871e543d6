"""What an item says in words: cleaned text, the filled template, and its terms."""

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Item:
    """An item as its source describes it.

    categories: paths from root to leaf; a flat label such as a genre is a path of one.
    """

    id: str
    title: str = ""
    categories: tuple[tuple[str, ...], ...] = ()
    description: str = ""

    @property
    def has_text(self) -> bool:
        return bool(self.title or self.categories or self.description)


def make_item(
    item_id: str, title: str | None, paths: Sequence[Sequence[str]] = (), description: str | None = ""
) -> Item:
    """An `Item` of cleaned text, without empty names and without repeated paths."""
    cleaned = (tuple(filter(None, map(clean, path))) for path in paths)
    return Item(
        id=item_id,
        title=clean(title or ""),
        categories=tuple(dict.fromkeys(filter(None, cleaned))),
        description=clean((description or "")[: 4 * _DESCRIPTION_LIMIT])[:_DESCRIPTION_LIMIT],
    )


def clean(text: str) -> str:
    """Unescapes HTML entities (twice: some are escaped twice), drops tags, and joins runs of blanks."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    return " ".join(text.split())


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


def fill_template(template: str, item: Item) -> str:
    """The template with the item's fields; an empty field goes together with the words before it."""
    values = {
        "title": item.title,
        "categories": ", ".join(dict.fromkeys(name for path in item.categories for name in path)),
        "description": item.description,
    }
    text = ""
    for literal, name, _, _ in Formatter().parse(template):
        if name is not None and not values[name]:
            continue
        text += literal if text else literal.lstrip(" .,;:")
        text += values[name] if name is not None else ""
    return text.strip() or item.id


def item_terms(items: Sequence[Item]) -> tuple[CSR, Strings]:
    """The terms of each item and their vocabulary.

    A row lists category names from leaf to root, path by path, then title words; a term stands where it
    occurs first. A title word of one item alone is left out: it tells nothing about another. Upper and lower
    case are one term, written as it is seen first.
    """
    words = [_title_words(item.title) for item in items]
    frequency = Counter(word for row in words for word in row)
    numbers: dict[str, int] = {}
    names: list[str] = []
    rows = []
    for item, title_words in zip(items, words, strict=True):
        found = [name for path in item.categories for name in reversed(path)]
        found += [word for word in title_words if frequency[word] > 1 or word in numbers]
        for name in found:
            if numbers.setdefault(name.casefold(), len(names)) == len(names):
                names.append(name)
        rows.append(list(dict.fromkeys(numbers[name.casefold()] for name in found)))
    return CSR.from_lists(rows), Strings.from_list(names)


def _title_words(title: str) -> list[str]:
    words = (word.strip("-'’") for word in _WORD.findall(title.casefold()))
    return list(dict.fromkeys(word for word in words if len(word) > 2 and word not in _COMMON_WORDS))
