"""ONNX holds what the blocks hold: every format through a real onnxruntime, on a graph of a lookup and a product."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor

from formats import FORMATS, BlockFormat, find_format
from qronos_export.artifact.onnx_blocks import MX_TYPES, container
from qronos_export.artifact.onnx_data import DataFile, read
from qronos_export.artifact.onnx_genai import GenAI
from qronos_export.artifact.onnx_graph import Opened, Piece, Style, rewritten
from qronos_export.artifact.onnx_package import copy_beside
from qronos_export.artifact.onnx_plain import Plain
from qronos_export.artifact.onnx_rows import Rows
from qronos_export.artifact.onnx_session import Session, find_model
from qronos_export.conversion import convert
from qronos_export.errors import ArtifactError, UsageError

GRIDS = [
    "INT4_G128",
    "INT8_G16",
    "INT2_G32",
    "UINT4_G64",
    "UINT2_G256",
    "UINT8_G128",
    "INT3_G32",
    "TERNARY_G64",
    "INT4",
]
NAMES = [*(name for name, fmt in FORMATS.items() if container(fmt)), *GRIDS, "DINT4_G32"]
COLUMNS, ROWS, VOCABULARY = 512, 24, 40


def weights(rows: int, columns: int = COLUMNS) -> Tensor:
    """Uneven in size, with a block of zeros and one of a single value, which has a minimum and no scale."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    drawn *= torch.logspace(-2, 1, rows)[:, None]
    drawn[0, :256], drawn[1, :256] = 0.0, -0.75
    return drawn


def piece(fmt: BlockFormat, key: str, blocks: Tensor) -> Piece:
    shape = len(blocks), blocks.shape[1] // fmt.block_bytes * fmt.block_size
    return Piece(key, fmt, shape, lambda: blocks)


@pytest.fixture
def floats(tmp_path: Path) -> Opened:
    """ids → rows of a table → table · weightᵀ, in float, as the builder writes it."""
    path = tmp_path / "float.onnx"
    with DataFile(tmp_path / "float.onnx.data") as data:
        initializers = [
            data.put("table", np.zeros((VOCABULARY, COLUMNS), np.float32)),
            data.put("weight", np.zeros((COLUMNS, ROWS), np.float32)),
        ]
    nodes = [make_node("Gather", ["table", "ids"], ["x"]), make_node("MatMul", ["x", "weight"], ["y"])]
    ids = make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    shapes = {"x": ["batch", "length", COLUMNS], "y": ["batch", "length", ROWS]}
    outputs = [make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = make_graph(nodes, "g", [ids], outputs, initializers)
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10), path)
    return Opened(path)


def written(floats: Opened, style: Callable[[DataFile], Style], **pieces: list[Piece]) -> tuple[Path, Style]:
    path = floats.folder / "model.onnx"
    with DataFile(floats.folder / "model.onnx.data") as data:
        chosen = style(data)
        onnx.save(rewritten(floats, pieces, chosen), path)
    return path, chosen


def terms(fmt: BlockFormat, blocks: Tensor) -> Tensor:
    """The sum of the magnitudes that a weight is made of."""
    held = container(fmt)
    if held is None:
        return fmt.dequantize(blocks).abs().double()
    parts = held.pack(blocks)
    found = 2**held.bits * parts.scales.abs().repeat_interleave(held.block, dim=1)
    return (found if parts.offsets is None else found + parts.offsets.abs().repeat_interleave(held.group, 1)).double()


def multiplied(x: Tensor, y: Tensor, value: Tensor, size: Tensor) -> None:
    """Each column of `y` is `x` times a row of `value`, to a millionth of what sums of `size` reach for some `x`."""
    error = (y - x.double() @ value.double().T).abs()
    reached = x.double().abs() @ size.double().T
    assert (error.flatten(0, 1).amax(0) <= 1e-6 * reached.flatten(0, 1).amax(0)).all()


def exact(data: DataFile) -> Style:
    return GenAI(data, accuracy_level=0)


def plain(data: DataFile) -> Style:
    return Plain(data, head_size=32, widths={})


def outputs(path: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    options = SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # else 4, of what it makes of plain
    found = InferenceSession(path, options, ["CPUExecutionProvider"]).run(["x", "y"], {"ids": ids.numpy()})
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_container_holds_every_value_bit_for_bit(name: str) -> None:
    fmt = find_format(name, COLUMNS)
    held = container(fmt)
    assert held is not None
    blocks = fmt.quantize(weights(ROWS))
    assert torch.equal(held.values(held.pack(blocks)), fmt.dequantize(blocks))
    assert torch.equal(held.values(held.pack(blocks, factor=0.25)), fmt.dequantize(blocks) / 4)


@pytest.mark.parametrize("name", ["MXFP8_E4M3", "MXFP8_E5M2", "MXFP6_E3M2", "INT4_G8", "INT4_G24", "DINT8_G32", "F16"])
def test_what_no_integers_hold_has_no_container(name: str) -> None:
    assert container(find_format(name, COLUMNS)) is None


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_computes_with_the_values_of_the_blocks(floats: Opened, name: str) -> None:
    """Lookups to the bit, products but for float32's rounding of their terms, which are code, zero point and offset."""
    fmt = find_format(name, COLUMNS)
    table, weight = fmt.quantize(weights(VOCABULARY)), fmt.quantize(weights(ROWS))
    path, style = written(floats, exact, table=[piece(fmt, "table", table)], weight=[piece(fmt, "weight", weight)])
    ids = torch.arange(VOCABULARY).view(2, -1)
    x, y = outputs(path, ids)
    assert torch.equal(x, fmt.dequantize(table)[ids])
    multiplied(x, y, fmt.dequantize(weight), terms(fmt, weight))
    for each in (piece(fmt, "table", table), piece(fmt, "weight", weight)):
        style.verify(each)


def test_rows_of_several_types_are_several_products_in_their_order(floats: Opened) -> None:
    """As in a fused q, k, v of a mix, one of them in a type that no integers hold."""
    kinds = ("Q4_K", "Q6_K", "MXFP8_E4M3")
    parts = [find_format(kind, COLUMNS) for kind in kinds]
    blocks = [fmt.quantize(rows) for fmt, rows in zip(parts, weights(ROWS).split(ROWS // 3), strict=True)]
    table = weights(VOCABULARY)
    f32 = FORMATS["F32"]
    path, _ = written(
        floats, exact,
        table=[piece(f32, "table", f32.quantize(table))],
        weight=[piece(fmt, kind, block) for fmt, kind, block in zip(parts, kinds, blocks, strict=True)],
    )  # fmt: skip
    ids = torch.tensor([[3, 39, 3]])
    x, y = outputs(path, ids)
    assert torch.equal(x, table[ids])
    value = torch.cat([fmt.dequantize(block) for fmt, block in zip(parts, blocks, strict=True)])
    size = torch.cat([terms(fmt, block) for fmt, block in zip(parts, blocks, strict=True)])
    multiplied(x, y, value, size)


def test_a_tied_head_takes_no_bytes_of_its_own(floats: Opened, tmp_path: Path) -> None:
    fmt = FORMATS["Q4_0"]
    blocks = fmt.quantize(weights(ROWS))
    same = [piece(fmt, "one", blocks)]
    written(floats, exact, table=same, weight=same)
    tied = (tmp_path / "model.onnx.data").stat().st_size
    written(floats, exact, table=[piece(fmt, "two", blocks)], weight=same)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 2 * tied - 64


def test_verify_sees_one_flipped_bit(floats: Opened, tmp_path: Path) -> None:
    fmt = FORMATS["Q4_0"]
    mine = piece(fmt, "weight", fmt.quantize(weights(ROWS)))
    _, style = written(floats, exact, table=[piece(fmt, "t", fmt.quantize(weights(VOCABULARY)))], weight=[mine])
    style.verify(mine)
    tensor = style.initializers["weight_Q4"]
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.seek(offset + 1000)
        byte = file.read(1)[0]
        file.seek(offset + 1000)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(ArtifactError, match=r"does not hold the values of weight\.$"):
        style.verify(mine)


def test_transformers_js_finds_the_chat_template(tmp_path: Path) -> None:
    """Its loader reads tokenizer.json and tokenizer_config.json alone."""
    for name in ("config.json", "tokenizer_config.json", "genai_config.json", "model.onnx.data"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}«{{ message }}»")
    for layout, template in (("onnx", None), ("onnx-js", "{% for message in messages %}«{{ message }}»")):
        (tmp_path / layout).mkdir()
        copy_beside(tmp_path, tmp_path / layout, layout)
        entries = json.loads((tmp_path / layout / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert entries.get("chat_template") == template and (tmp_path / layout / "chat_template.jinja").is_file()
        assert (tmp_path / layout / "genai_config.json").is_file() == (layout == "onnx")


def test_keys_of_rows_are_short_and_tell_rows_apart() -> None:
    many = torch.arange(100_000)
    keys = {Rows("a", many).key, Rows("a", many.flip(0)).key, Rows("b", many).key, Rows("a", many.clone()).key}
    assert len(keys) == 3 and all(len(str(key)) < 100 for key in keys)


def test_accuracy_level_4_rounds_inputs_and_0_does_not(floats: Opened) -> None:
    fmt = FORMATS["Q4_0"]
    pieces = {
        "table": [piece(fmt, "table", fmt.quantize(weights(VOCABULARY)))],
        "weight": [piece(fmt, "weight", fmt.quantize(weights(ROWS)))],
    }
    ids = torch.arange(VOCABULARY)[None]
    _, plain = outputs(written(floats, exact, **pieces)[0], ids)
    _, rounded = outputs(written(floats, lambda data: GenAI(data, accuracy_level=4), **pieces)[0], ids)
    error = float((rounded - plain).norm() / plain.norm())
    assert 1e-4 < error < 2e-2  # int8 in blocks: a quarter of a percent each, less together


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DINT4_G32", "INT4")])
def test_standard_operators_say_the_same(floats: Opened, name: str) -> None:
    """Looked up and multiplied with in two graphs: a product both of whose sides are dequantized is to onnxruntime one
    of integers, which it does not have for 2 bits; decoders have a norm between."""
    fmt, f32 = find_format(name, COLUMNS), FORMATS["F32"]
    table, weight = (piece(fmt, str(rows), fmt.quantize(weights(rows))) for rows in (VOCABULARY, ROWS))
    plain_table, plain_weight = (
        piece(f32, f"{rows} floats", f32.quantize(weights(rows))) for rows in (VOCABULARY, ROWS)
    )
    ids = torch.arange(VOCABULARY).view(2, -1)
    path, style = written(floats, plain, table=[table], weight=[plain_weight])
    x, _ = outputs(path, ids)
    assert torch.equal(x, table.floats()[ids])
    style.verify(table)
    path, style = written(floats, plain, table=[plain_table], weight=[weight])
    x, y = outputs(path, ids)
    multiplied(x, y, weight.floats(), terms(fmt, weight.blocks()))
    style.verify(weight)
    onnx.checker.check_model(path, full_check=True)
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {""}


@pytest.mark.parametrize("name", MX_TYPES)
def test_microscaling_types_are_onnxs_own(floats: Opened, name: str) -> None:
    """By the standard's reference evaluator; onnxruntime has no kernel for them on CPUs."""
    fmt = FORMATS[name]
    blocks = fmt.quantize(weights(ROWS))
    table = piece(FORMATS["F32"], "table", FORMATS["F32"].quantize(weights(VOCABULARY)))
    mine = piece(fmt, "weight", blocks)
    path, style = written(floats, lambda data: Plain(data, 32, {}, mx=True), table=[table], weight=[mine])
    onnx.checker.check_model(path)
    style.verify(mine)
    ids = torch.arange(VOCABULARY).view(2, -1)
    x, y = (torch.from_numpy(found) for found in ReferenceEvaluator(str(path)).run(["x", "y"], {"ids": ids.numpy()}))
    multiplied(x, y, fmt.dequantize(blocks), fmt.dequantize(blocks).abs())
    kinds = {each.data_type for each in style.initializers.values()}
    assert TensorProto.FLOAT8E8M0 in kinds and kinds & {
        TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2
    }  # fmt: skip


def test_missing_and_short_data_are_named(floats: Opened, tmp_path: Path) -> None:
    (tmp_path / "float.onnx.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"float\.onnx\.data ends inside table: the file is truncated"):
        read(floats.tensors["table"], tmp_path)
    (tmp_path / "float.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"float\.onnx\.data is missing: it holds the weights"):
        Session(tmp_path / "float.onnx")
    for entry in floats.tensors["table"].external_data:
        if entry.key == "location":
            entry.value = "../elsewhere"
    with pytest.raises(ArtifactError, match=r"read from \.\./elsewhere, outside of"):
        read(floats.tensors["table"], tmp_path)
    for key, odd in (("length", "-5"), ("offset", "here")):
        tensor = TensorProto()
        tensor.CopyFrom(floats.tensors["weight"])
        for entry in tensor.external_data:
            entry.value = odd if entry.key == key else entry.value
        (tmp_path / "float.onnx.data").touch()
        with pytest.raises(ArtifactError, match=r"weight of the model in .* lies at .*, which is no place"):
            read(tensor, tmp_path)
    del floats.tensors["table"].external_data[:]
    with pytest.raises(ArtifactError, match="does not say which file holds it"):
        read(floats.tensors["table"], tmp_path)


def test_data_may_be_linked_as_in_the_hubs_cache(floats: Opened, tmp_path: Path) -> None:
    before = read(floats.tensors["table"], tmp_path).copy()
    (tmp_path / "blobs").mkdir()
    data = (tmp_path / "float.onnx.data").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "float.onnx.data").symlink_to(data)
    assert np.array_equal(read(floats.tensors["table"], tmp_path / "snapshot"), before)


def test_what_onnxruntime_cannot_run_is_refused_with_its_opset(floats: Opened, tmp_path: Path) -> None:
    model = onnx.load(tmp_path / "float.onnx", load_external_data=False)
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ArtifactError, match=r"cannot run .*new\.onnx, of opset ai\.onnx 99 and IR"):
        Session(tmp_path / "new.onnx")
    (tmp_path / "no.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(ArtifactError, match=r"no\.onnx cannot be read as ONNX"):
        Session(tmp_path / "no.onnx")
    with pytest.raises(ArtifactError, match=r"no decoder with input_ids and logits; its inputs are ids"):
        Session(tmp_path / "float.onnx")


@pytest.mark.parametrize(("declared", "within"), [(21, False), (22, False), (22, True), (23, False)])
def test_an_operator_of_a_later_opset_is_not_relabelled(floats: Opened, declared: int, within: bool) -> None:
    """Cos is another since opset 22, RMSNormalization there since 23; we write 21."""
    floats.model.opset_import[0].version = declared
    node = make_node("RMSNormalization" if declared == 23 else "Cos", ["y"], ["z"], name="late")
    if within:
        branch = make_graph([node], "branch", [], [make_tensor_value_info("z", TensorProto.FLOAT, None)])
        node = make_node("If", ["ready"], ["z"], then_branch=branch, else_branch=branch)
    graph = floats.model.graph
    graph.node.append(node)
    f32 = FORMATS["F32"]
    pieces = {
        "table": [piece(f32, "table", f32.quantize(weights(VOCABULARY)))],
        "weight": [piece(f32, "weight", f32.quantize(weights(ROWS)))],
    }
    written(floats, exact, **pieces)  # nothing needs it
    graph.output.append(make_tensor_value_info("z", TensorProto.FLOAT, None))
    if declared == 21:
        written(floats, exact, **pieces)
        return
    with pytest.raises(ArtifactError, match=rf"late of the graph is the \w+ of opset {declared}, .* is of opset 21"):
        written(floats, exact, **pieces)


@pytest.mark.parametrize(("kinds", "says"), [(["F32"], "F32"), (["F32", "F16"], "F16 and F32"), (["BF16"], "BF16")])
def test_a_float_gguf_is_not_converted(kinds: list[str], says: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "float.gguf", "llama")
    for kind in kinds:
        data = FORMATS[kind].quantize(torch.ones(2, 32)).numpy()
        writer.add_tensor(kind, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=rf"float\.gguf is not quantized: it holds {says} alone\. Give a quantized"):
        list(convert(tmp_path / "float.gguf", tmp_path / "out", ["onnx"]))
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qronos_export.artifact.onnx_builder.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'qronos-export\[onnx\]'"):
        find_model(Path("model.onnx"))
