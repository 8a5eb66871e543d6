"""The options of `prepare`, checked once."""

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raygrec.config import StrictConfig
from raygrec.data.text import check_template
from raygrec.errors import InputError

# What a format changes in the defaults: sequences come filtered, and stay as they are.
_FORMAT_DEFAULTS: dict[str, dict[str, Any]] = {"sequences": {"k_core": 0, "deduplicate": False}}
# Options of tables alone, and of those the ones of the items table.
ITEM_OPTIONS = ("title_column", "categories_column", "description_column", "category_separator")
TABLE_OPTIONS = ("items", "user_column", "item_column", "rating_column", "time_column", *ITEM_OPTIONS)


class PrepareOptions(StrictConfig):
    """How raw files become a store."""

    format: Literal["amazon", "movielens", "yelp", "goodreads", "sequences", "table"]
    """The layout of `path`."""
    path: Path
    """A folder as its publisher left it; for tables also a file."""
    out: Path
    """The store's folder."""
    overwrite: bool = False
    """Whether a store at `out` may be replaced."""
    name: str | None = None
    """What the data set is called; the name of `path` if unset."""

    min_rating: float | None = None
    """Interactions rated lower, or not rated, are left out."""
    date_from: date | None = None
    """The first day that counts, UTC."""
    date_to: date | None = None
    """The last day that counts, UTC."""
    deduplicate: bool = True
    """Of repeated (user, item) pairs only the earliest stays. For sequences the default is to keep all."""
    k_core: int = Field(default=5, ge=0)
    """Every user and item keeps at least that many interactions; 0 = off, the default for sequences."""

    split: Literal["leave-one-out", "ratio", "global-time"] = "leave-one-out"
    """Last = test, the one before = validation; a random share of each user's; or all after a moment."""
    valid_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of all interactions, not used by leave-one-out."""
    test_ratio: float = Field(default=0.2, ge=0, lt=1)
    """Share of all interactions, not used by leave-one-out."""
    seed: int = Field(default=0, ge=0)
    """Of the ratio split."""

    text_template: str = "{title}. {categories}"
    """An item's text; may name {title}, {categories} and {description}."""
    allow_missing_text: bool = False
    """Items that the source does not describe get their id as text; otherwise they are an error."""
    tokenizer: str | None = None
    """A folder or hub id whose token ids are made right away."""

    items: Path | None = None
    """The items table; in a folder of tables it is found by its name."""
    user_column: str = "user"
    item_column: str = "item"
    rating_column: str = "rating"
    """Read only with `min_rating`."""
    time_column: str | None = "time"
    """Whole numbers are seconds since 1970; dates and fractions work too. None: the file is in time order."""
    title_column: str = "title"
    categories_column: str = "categories"
    description_column: str = "description"
    category_separator: str = Field(default="|", min_length=1)
    """Stands between the names of a category path, root first."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_format_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        optional = ("k_core", "deduplicate")  # None means the format's default
        given = {key: value for key, value in given.items() if not (key in optional and value is None)}
        return {**_FORMAT_DEFAULTS.get(str(given.get("format")), {}), **given}

    @field_validator("path", "out", "items")
    @classmethod
    def _check_path(cls, path: Path | None) -> Path | None:
        try:
            str(path and path.resolve()).encode()  # the manifest, the name in it and what is printed are UTF-8
        except UnicodeEncodeError:
            raise ValueError("its full path is not UTF-8; rename what is not") from None
        return path

    @field_validator("text_template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        try:
            return check_template(template)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("time_column")
    @classmethod
    def _empty_is_none(cls, column: str | None) -> str | None:
        return column or None

    @model_validator(mode="after")
    def _check_together(self) -> "PrepareOptions":
        if self.valid_ratio + self.test_ratio >= 1:
            raise ValueError("valid_ratio and test_ratio leave nothing for training; their sum must be below 1")
        if self.date_from and self.date_to and self.date_from > self.date_to:
            raise ValueError(f"date_from {self.date_from} lies after date_to {self.date_to}")
        untimed = self.format == "sequences" or (self.format == "table" and self.time_column is None)
        if self.split == "global-time" and untimed:
            raise ValueError("split 'global-time' needs times: a table with a time_column, or another format")
        return self
