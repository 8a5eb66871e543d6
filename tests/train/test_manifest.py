import json

import pytest

from raygrec.errors import InputError
from raygrec.train import manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("abc")
    (folder / "below" / "b.bin").write_bytes(bytes(range(200)))
    manifest.seal(folder)
    return folder


def entry(folder, name: str) -> dict[str, object]:
    return json.loads((folder / manifest.NAME).read_text())["files"][name]


def rewrite(folder, change) -> None:
    content = json.loads((folder / manifest.NAME).read_text())
    change(content)
    (folder / manifest.NAME).write_text(json.dumps(content))


def test_what_was_sealed_is_whole(folder):
    manifest.check(folder)
    # BLAKE2b of 16 bytes of "abc", as coreutils' `b2sum -l 128` prints it.
    assert entry(folder, "a.txt") == {"bytes": 3, "blake2b": "cf4ab791c62b8d2b2109c90275287816"}
    assert entry(folder, "below/b.bin")["bytes"] == 200


def flip(folder):
    content = bytearray((folder / "below" / "b.bin").read_bytes())
    content[100] ^= 4
    (folder / "below" / "b.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"below/b\.bin: its checksum is not that of what was written"),
        (lambda f: (f / "a.txt").write_text("ab"), r"a\.txt: has 2 bytes, 3 were written"),
        (lambda f: (f / "a.txt").unlink(), r"folder: 'a\.txt' of its manifest is missing"),
        (lambda f: (f / "c.txt").touch(), r"c\.txt: is not in the manifest"),
        (lambda f: (f / manifest.NAME).unlink(), r"manifest\.json: is missing"),
        (lambda f: (f / manifest.NAME).write_text('{"version": 1'), r"manifest\.json: not readable"),
        (lambda f: (f / manifest.NAME).write_text("[" * 100_000), r"manifest\.json: not readable"),
        (lambda f: (f / manifest.NAME).write_bytes(b"\xff"), r"manifest\.json: not readable"),
        (lambda f: (f / manifest.NAME).write_text("[]"), r"manifest\.json: not a manifest of version 1"),
        (lambda f: rewrite(f, lambda m: m.update(version=2)), r"manifest\.json: not a manifest of version 1"),
        (lambda f: rewrite(f, lambda m: m["files"].update({"a.txt": 3})), r"manifest\.json: not a manifest"),
    ],
)
def test_the_damaged_file_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        manifest.check(folder)


def test_a_manifest_leads_nowhere_else(folder):
    """A name with .. in it is the name of no file, even where its size and checksum are right."""
    outside = folder.parent / "outside.txt"
    outside.write_text("abc")
    rewrite(folder, lambda m: m["files"].update({"../outside.txt": m["files"]["a.txt"]}))
    with pytest.raises(InputError, match=r"'\.\./outside\.txt' of its manifest is missing"):
        manifest.check(folder)
    rewrite(folder, lambda m: m["files"].update({str(outside): m["files"].pop("../outside.txt")}))
    with pytest.raises(InputError, match=r"outside\.txt' of its manifest is missing"):
        manifest.check(folder)


def test_links_are_refused(folder):
    whole = folder.parent / "link"
    whole.symlink_to(folder)
    with pytest.raises(InputError, match="link: is a link"):
        manifest.check(whole)
    outside = (folder / "a.txt").rename(folder.parent / "outside.txt")
    (folder / "a.txt").symlink_to(outside)
    with pytest.raises(InputError, match=r"a\.txt: is a link"):
        manifest.check(folder)
