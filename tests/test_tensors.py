import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raygrec.errors import InputError
from raygrec.tensors import CHECKSUM, checksum, load_tensors, save_tensors, size

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor(2, dtype=torch.int64),
    "c": torch.tensor([True, False]),
    "d": torch.ones(3, dtype=torch.bfloat16),
    "e": torch.zeros(0),
}


def test_tensors_come_back_as_they_were(tmp_path):
    save_tensors(tmp_path / "t", TENSORS, {"seed": "1"})
    for found in (load_tensors(tmp_path / "t"), load_file(tmp_path / "t")):
        assert found.keys() == TENSORS.keys()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in found.items()
        )
    assert size(TENSORS) == 24 + 8 + 2 + 6


def test_the_checksum_sees_names_types_shapes_and_values():
    one = {"w": torch.zeros(2, 3), "v": torch.ones(1)}
    others = [
        {"w": torch.zeros(3, 2), "v": torch.ones(1)},
        {"w": torch.zeros(2, 3, dtype=torch.int32), "v": torch.ones(1)},
        {"x": torch.zeros(2, 3), "v": torch.ones(1)},
        {"w": torch.zeros(2, 3), "v": -torch.ones(1)},
        {"w": torch.zeros(2, 3)},
    ]
    assert len({checksum(tensors) for tensors in (one, *others)}) == 6
    assert checksum(one) == checksum(dict(reversed(one.items())))
    transposed = torch.arange(6.0).view(2, 3).T
    assert checksum({"w": transposed}) == checksum({"w": transposed.contiguous()})


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    file = tmp_path / "t"
    save_tensors(file, TENSORS)
    content = file.read_bytes()
    refused = 0
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found = load_tensors(file)
        except InputError as error:
            assert str(file) in str(error)
            refused += 1
            continue
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert refused > 0.8 * len(content)  # the rest is padding, and the checksum's own name
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match="not readable as safetensors"):
            load_tensors(file)


def test_files_of_others_have_no_checksum(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "t")
    assert torch.equal(load_tensors(tmp_path / "t")["w"], torch.ones(2))
    save_file({"w": torch.ones(2)}, tmp_path / "t", {CHECKSUM: checksum({"w": torch.zeros(2)})})
    with pytest.raises(InputError, match=r"t: damaged, its tensors do not have the checksum in its header"):
        load_tensors(tmp_path / "t")


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.file,)


def test_a_pickle_is_not_read(tmp_path):
    mark, file = tmp_path / "executed", tmp_path / "t.safetensors"
    file.write_bytes(pickle.dumps(Evil(mark)))
    pickle.loads(file.read_bytes())
    assert mark.exists()  # it would work
    mark.unlink()
    with pytest.raises(InputError, match=r"t\.safetensors: not readable as safetensors"):
        load_tensors(file)
    torch.save(Evil(mark), file)
    with pytest.raises(InputError, match=r"t\.safetensors: not readable as safetensors"):
        load_tensors(file)
    assert not mark.exists()
