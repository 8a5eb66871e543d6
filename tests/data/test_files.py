import gzip

import pytest

from raygrec.data import files
from raygrec.errors import InputError


def test_lines_have_their_numbers_and_blank_ones_are_skipped(tmp_path):
    path = tmp_path / "lines.txt.gz"
    path.write_bytes(gzip.compress("one\n\nthree é\r\n".encode()))
    assert list(files.read_lines(path)) == [(1, "one"), (3, "three é")]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert list(files.read_lines(path, encoding)) == [(1, "one"), (2, b"\xef\xbb\xbftwo".decode(encoding))]


def test_metered_reading_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BAR_FROM_BYTES", 0)
    path = tmp_path / "lines.txt"
    path.write_text("a\nb\n")
    assert list(files.read_lines(path)) == [(1, "a"), (2, "b")]
    assert files.sha256(path) == "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ok\n\xff\xfe\n", "lines.txt.gz, line 2: not UTF-8 text"),
        (None, "lines.txt.gz: cannot be read (No such file or directory)"),
    ],
)
def test_unreadable_lines(tmp_path, content, message):
    path = tmp_path / "lines.txt.gz"
    if content is not None:
        path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError) as error:
        list(files.read_lines(path))
    assert str(error.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"no gzip", lambda data: data[:15] + b"x" * 9]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "lines.txt.gz"
    path.write_bytes(damage(gzip.compress(b"line\n" * 5000)))
    with pytest.raises(InputError, match="not a complete gzip file"):
        list(files.read_lines(path))


def test_python_literals_only_where_asked_and_never_run(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{'asin': 'A', 'title': \"it's\"}\n")
    assert list(files.read_records(path, python_literals=True)) == [(1, {"asin": "A", "title": "it's"})]
    with pytest.raises(InputError, match="line 1: expected one JSON object, found"):
        list(files.read_records(path))
    path.write_text("__import__('os').getcwd()\n")
    with pytest.raises(InputError, match="line 1: expected one JSON object"):
        list(files.read_records(path, python_literals=True))


def test_half_a_character_names_its_line_and_whole_ones_pass(tmp_path):
    path = tmp_path / "items.json"
    path.write_text('{"title": "\\ud83d\\ude00 \\u00e9"}\n{"title": "cut \\uD83D"}\n')
    found = files.read_records(path)
    assert next(found) == (1, {"title": "\U0001f600 \u00e9"})
    with pytest.raises(InputError) as caught:
        next(found)
    assert str(caught.value) == f"{path}, line 2: '\\ud83d' is half a character; expected both"
