"""GGUF files without llama.cpp: finding rows by content, odd files, and what a damaged one says."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from formats import FORMATS
from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.artifact.gguf_verify import verify_gguf
from qronos_export.artifact.gguf_write import write_gguf
from qronos_export.errors import ArtifactError


def write(path: Path, tensors: dict[str, Tensor]) -> GGUFFile:
    """A float file with these tensors and a vocabulary of two."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_rows_that_exist_several_times_are_found_as_often(tmp_path: Path) -> None:
    """Zero rows of a pruned layer, heads that were copied: each row of a weight goes to one place of the file."""
    torch.manual_seed(0)
    gate, up = torch.randn(6, 32), torch.randn(6, 32)
    gate[2] = gate[5] = up[3] = 0.0
    up[4] = up[1]
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    file = write(tmp_path / "f.gguf", {"ffn_up": up[order], "ffn_gate": gate})
    index = RowIndex(file, list(file.tensors))
    targets = index.match({"gate": gate, "up": up})
    assert index.unmatched == []
    assert [(t.tensor, t.source) for t in targets] == [("ffn_up", "up"), ("ffn_gate", "gate")]
    for target in targets:
        weight = {"gate": gate, "up": up}[target.source]
        assert sorted(target.rows.tolist()) == list(range(6))
        stored = torch.cat(list(file.floats(target.tensor)))
        assert torch.equal(stored[target.file_rows], weight[target.rows])


def test_experts_that_are_copies_each_get_their_rows(tmp_path: Path) -> None:
    one = torch.randn(4, 32)
    file = write(tmp_path / "f.gguf", {"exps": torch.stack([one, one, one + 1])})
    targets = RowIndex(file, ["exps"]).match({"e0": one, "e1": one.clone(), "e2": one + 1})
    assert {t.source: t.file_rows.tolist() for t in targets} == {
        "e0": [0, 1, 2, 3], "e1": [4, 5, 6, 7], "e2": [8, 9, 10, 11],
    }  # fmt: skip


def test_a_tensor_with_one_foreign_row_is_nobodys(tmp_path: Path) -> None:
    weight = torch.randn(4, 32)
    other = weight.clone()
    other[3, 7] += 1
    file = write(tmp_path / "f.gguf", {"a": other, "b": torch.cat([weight, weight[:1]])})
    index = RowIndex(file, ["a", "b"])
    assert index.match({"w": weight}) == [] and index.unmatched == ["a", "b"]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.ggml_type is not None])
def test_every_type_can_be_written_and_read_back(name: str, tmp_path: Path) -> None:
    """Also those that gguf-py does not list."""
    weight = torch.randn(8, 512)
    source = write(tmp_path / "f.gguf", {"w": weight, "norm": torch.ones(8)})
    fmt, store = FORMATS[name], BlockStore(tmp_path / "blocks")
    blocks = fmt.quantize(weight)
    store.put(source.tensors["w"], fmt, torch.arange(8), blocks, fmt.dequantize(blocks), torch.ones(8))
    write_gguf(source, store, 7, tmp_path / "out.gguf")
    written = verify_gguf(tmp_path / "out.gguf", source, store)
    assert written.tensors["w"].type == name and written.reader.fields["general.file_type"].contents() == 7
    assert torch.equal(torch.cat(list(written.floats("w"))), fmt.dequantize(blocks))
    damaged = bytearray((tmp_path / "out.gguf").read_bytes())
    damaged[written.tensors["w"].offset + 9] ^= 0x55
    (tmp_path / "out.gguf").write_bytes(damaged)
    with pytest.raises(ArtifactError, match="w is not what was calibrated"):
        verify_gguf(tmp_path / "out.gguf", source, store)


def test_scales_lie_beside_their_tensor(tmp_path: Path) -> None:
    experts = torch.randn(3, 4, 64)
    source = write(tmp_path / "f.gguf", {"blk.0.up_exps.weight": experts})
    (tensor,), fmt, store = source.tensors.values(), FORMATS["NVFP4"], BlockStore(tmp_path / "blocks")
    blocks = fmt.quantize(experts.view(12, 64))
    for expert, scale in enumerate((1.0, 0.25, 8.0)):
        rows = torch.arange(4 * expert, 4 * expert + 4)
        values = fmt.dequantize(blocks[rows])
        store.put(tensor, fmt, rows, blocks[rows], values, torch.full((4,), scale))
    write_gguf(source, store, 7, tmp_path / "out.gguf")
    written = verify_gguf(tmp_path / "out.gguf", source, store)
    assert written.tensors["blk.0.up_exps.scale"].shape == (3,)
    assert torch.cat(list(written.floats("blk.0.up_exps.scale"))).flatten().tolist() == [1.0, 0.25, 8.0]
    with pytest.raises(ArtifactError, match="different scales"):
        store.put(tensor, fmt, rows, blocks[rows], values, torch.ones(4))


@pytest.mark.parametrize("kept", [10, 60, 150, 400, 4000])
def test_a_truncated_file_is_an_error_of_ours(kept: int, tmp_path: Path) -> None:
    write(tmp_path / "f.gguf", {"w": torch.randn(32, 32)})
    whole = (tmp_path / "f.gguf").read_bytes()
    assert len(whole) > 4000
    (tmp_path / "f.gguf").write_bytes(whole[:kept])
    with pytest.raises(ArtifactError, match=r"f\.gguf is not a readable GGUF file"):
        GGUFFile(tmp_path / "f.gguf")


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    write(tmp_path / "f.gguf", {"w": torch.randn(32, 32)})
    data = (tmp_path / "f.gguf").read_bytes()
    shape = np.array([32, 32], "<u8").tobytes()
    assert data.count(shape) == 1
    place = data.index(shape) + len(shape)
    (tmp_path / "f.gguf").write_bytes(data[:place] + (77).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(ArtifactError, match="w has the unknown type 77"):
        GGUFFile(tmp_path / "f.gguf")
