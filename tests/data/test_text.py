import pytest

from raygrec.data.text import Item, check_template, clean, fill_template, has_text, item_terms, make_item
from raygrec.errors import InputError


def test_clean_unescapes_and_drops_tags():
    assert clean("Salt &amp;amp; Pepper &#39;n&#39;\n <b>Co</b>.  I <3 it") == "Salt & Pepper 'n' Co . I <3 it"


def test_make_item_drops_empty_names_and_repeated_paths():
    item = make_item("a", None, [["Toys", ""], ["Toys"], []], None)
    assert item == Item("a", "", (("Toys",),), "")


@pytest.mark.parametrize(
    ("categories", "paths"),
    [
        ([["Beauty", "Hair"], ["Gifts"]], (("Beauty", "Hair"), ("Gifts",))),
        (["Beauty", "Hair"], (("Beauty", "Hair"),)),
        ("Beauty", (("Beauty",),)),
        ([], ()),
        (None, ()),
    ],
)
def test_categories_are_paths_or_one_path_or_one_name(categories, paths):
    assert make_item("a", "", categories).categories == paths


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((["x"], "T"), "id"),
        (("a", ["T"]), "title"),
        (("a", "T", {"a": 1}), "categories"),
        (("a", "T", 5), "categories"),
        (("a", "T", ["Beauty", ["Hair"]]), "categories"),
        (("a", "T", [["Beauty", None]]), "categories"),
        (("a", "T", (), ["D"]), "description"),
    ],
)
def test_what_is_no_text_is_refused_by_name(arguments, key):
    with pytest.raises(TypeError, match=f"^{key}: expected"):
        make_item(*arguments)


@pytest.mark.parametrize(
    ("template", "item", "text"),
    [
        (
            "{title}. {categories}",
            Item("1", "Gloom", (("Games", "Board Games"),)),
            "Gloom. Games, Board Games",
        ),
        ("{title}. {categories}", Item("1", "Gloom"), "Gloom"),
        ("{title}. {categories}", Item("1", "", (("Games",),)), "Games"),
        ("{title}. {categories}", Item("1"), "1"),
        ("Title: {title}; {description}", Item("1", "Gloom", (), "Dark."), "Title: Gloom; Dark."),
        ("{title} ({categories})", Item("1", "A", (("B", "C"), ("B", "D"))), "A (B, C, D)"),
    ],
)
def test_fill_template(template, item, text):
    assert fill_template(template, item) == text


def test_an_item_has_text_where_the_template_names_what_it_has():
    described = Item("1", description="Dark.")
    assert has_text("{title}. {description}", described)
    assert not has_text("{title}. {categories}", described)
    assert has_text("A {categories}", Item("1", categories=(("Games",),)))


@pytest.mark.parametrize("template", ["", "plain", "{name}", "{title.__class__}", "{title!r}", "{title", "{}"])
def test_wrong_templates_are_refused(template):
    with pytest.raises(InputError, match=r"text_template .*"):
        check_template(template)


def test_terms_go_from_leaf_to_root_then_title_words():
    items = [
        Item("1", "OPI Nail Lacquer", (("Beauty", "Makeup", "Nails"),)),
        Item("2", "opi nail File in the Makeup Bag", (("Beauty", "Tools"), ("Beauty", "Nails"))),
    ]
    terms, names = item_terms(items)
    assert [[names[number] for number in row] for row in (terms[0], terms[1])] == [
        ["Nails", "Makeup", "Beauty", "opi", "nail"],
        ["Tools", "Beauty", "Nails", "opi", "nail", "Makeup"],  # 'makeup' is the category's term
    ]
    assert list(names) == ["Nails", "Makeup", "Beauty", "opi", "nail", "Tools"]
