"""`inspect`: what it says of whole files, each thing it finds in damaged ones, and that no bytes make it crash."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from typer.testing import CliRunner

from formats import FORMATS, find_format
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.onnx_blocks import container
from qronos_export.artifact.onnx_data import DataFile
from qronos_export.cli import app
from qronos_export.errors import ArtifactError, QronosError, UsageError
from qronos_export.inspection import Inspection, inspect
from qronos_export.inspection.found import shown
from qronos_export.inspection.onnx_wire import read_model

STORED = [name for name, fmt in FORMATS.items() if fmt.ggml_type is not None]
TEMPLATE = "{% for m in messages %}\x1b[31m{{ m.content }}\n{{ cycler.__init__.__globals__.os.system('touch run') }}"
Change = Callable[[gguf.GGUFWriter], object]


def weights(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))


def write(path: Path, change: Change = lambda writer: None, types: tuple[str, ...] = tuple(STORED)) -> Path:
    """A small, complete file: a vocabulary of four, a template, and a tensor of each of `types`; `change` has the last
    word before it is written."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0])
    writer.add_token_types([2, 3, 3, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", weights(4).numpy())
    for name in types:
        put(writer, f"blk.0.{name}.weight", name, FORMATS[name].quantize(weights()).numpy())
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, name: str, kind: str, blocks: np.ndarray) -> None:
    """Also types that gguf-py does not list."""
    columns = blocks.shape[1] // FORMATS[kind].block_bytes * FORMATS[kind].block_size
    number = FORMATS[kind].ggml_type
    writer.add_tensor_info(name, (len(blocks), columns), np.dtype(np.float32), blocks.nbytes, raw_dtype=number)
    writer.tensors[-1][name].tensor = blocks


def checked(path: Path) -> list[tuple[str, str, str]]:
    found = inspect(path, numbers=False, check=True)
    return [(each.severity, each.where, each.what) for each in found.findings]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": None})  # as wide as a row is


def test_a_whole_file_is_described_as_upstreams_reader_does(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    found, upstream = inspect(path, numbers=True, check=True), GGUFFile(path)
    assert found.findings == []
    assert [(t.name, t.type, t.shape, t.bytes) for t in found.tensors] == [
        (t.name, t.type, t.shape, t.nbytes) for t in upstream.tensors.values()
    ]
    assert found.total.bits_per_weight == upstream.bits_per_weight
    for key, entry in found.metadata.items():
        contents = upstream.reader.fields[key].contents()
        assert entry.value == (contents if entry.count is None else contents[: len(entry.value)])
    assert found.tokenizer["size"] == 4 and found.tokenizer["special"]["eos"] == {"id": 2, "token": "</s>"}
    assert found.chat_templates == {"tokenizer.chat_template": TEMPLATE}
    version_2 = bytearray(path.read_bytes())
    version_2[4] = 2
    path.write_bytes(version_2)
    assert inspect(path, numbers=True, check=True).to_json(checked=True) == {
        **found.to_json(checked=True),
        "format": "GGUF v2",
    }


@pytest.mark.parametrize("name", STORED)
def test_statistics_are_those_of_the_dequantized_values(name: str, tmp_path: Path) -> None:
    fmt, rows = FORMATS[name], weights()
    rows[0, :] = 0.0
    blocks = fmt.quantize(rows)
    path = write(tmp_path / "f.gguf", lambda writer: put(writer, "w", name, blocks.numpy()), ())
    found = inspect(path, numbers=True, check=False).tensors[-1].statistics
    assert found is not None
    values, (_, grid) = fmt.dequantize(blocks), fmt.unpack(blocks)
    facts = found.to_json()
    assert facts["rms"] == pytest.approx(float(values.double().square().mean().sqrt()), rel=1e-5)  # sums are float32
    assert facts["zero_codes"] == float((values == 0).double().mean()) and facts["largest"] == float(
        values.abs().amax()
    )
    if not fmt.is_float:
        assert facts["scale_range"] == [float(end) for end in grid.scale.abs().aminmax()]
        assert facts["zero_blocks"] == float((values.view(-1, fmt.block_size) == 0).all(1).double().mean())


def _patched(path: Path, name: str, at: int, data: bytes) -> None:
    """Overwrite bytes of a tensor."""
    with path.open("r+b") as file:
        file.seek(GGUFFile(path).tensors[name].offset + at)
        file.write(data)


NAN, LARGE = np.float16(np.nan).tobytes(), np.float16(6e4).tobytes()
D = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}  # where d is, unless it comes first


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("MXFP4", "NVFP4")])
def test_nan_is_found_in_every_type(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    nan = {"F32": np.float32(np.nan).tobytes(), "BF16": b"\xc0\x7f"}.get(name, NAN)
    _patched(path, f"blk.0.{name}.weight", D.get(name, 0), nan)
    ((severity, where, what),) = checked(path)
    assert (severity, where) == ("error", f"blk.0.{name}.weight")
    assert ("values are NaN" if FORMATS[name].is_float else "blocks have NaN or infinite scales") in what


@pytest.mark.parametrize(
    ("name", "at", "data", "says"),
    [
        ("MXFP4", 0, b"\xff", "1 of 16 blocks have impossible scales"),
        ("NVFP4", 1, b"\x7f", "1 of 8 blocks have impossible scales"),
        ("NVFP4", 1, b"\x92", "1 of 8 blocks have impossible scales"),
        ("Q4_K", 1, b"\xbc", "1 of 2 blocks have impossible scales"),  # d = −1
        ("Q5_0", 0, LARGE, "impossible scales make"),
        ("Q4_1", 2, NAN, "1 of 16 blocks have NaN or infinite scales"),  # the minimum
        ("Q8_0", 2, b"\x80", "1 codes are outside of what Q8_0 writes"),
        ("TQ2_0", 0, b"\xff", "4 codes are outside of what TQ2_0 writes"),
    ],
)
def test_impossible_scales_and_codes_are_found(name: str, at: int, data: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    _patched(path, f"blk.0.{name}.weight", at, data)
    assert any(where == f"blk.0.{name}.weight" and says in what for _, where, what in checked(path))


def test_zeros_are_an_error_in_a_matrix_only(tmp_path: Path) -> None:
    def zeros(writer: gguf.GGUFWriter) -> None:
        put(writer, "m", "Q4_0", FORMATS["Q4_0"].quantize(torch.zeros(2, 256)).numpy())
        writer.add_tensor("bias", np.zeros(8, np.float32))

    assert checked(write(tmp_path / "f.gguf", zeros)) == [
        ("error", "m", "all 512 values are zero"),
        ("warning", "bias", "all 8 values are zero"),
    ]


def _info(data: bytes, name: str) -> int:
    """Where a tensor's number of dimensions is."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


Q4 = "blk.0.Q4_0.weight"  # two dimensions: count at 0, sizes at 4 and 12, type at 20, offset at 24


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        (20, struct.pack("<I", 77), "it has the unknown type 77"),
        (4, struct.pack("<Q", 250), "rows of 250 weights do not divide into Q4_0's blocks"),
        (4, struct.pack("<Q", 0), "holds nothing"),
        (4, struct.pack("<QQ", 1 << 62, 1 << 62), "beyond all sizes"),
        (4, struct.pack("<Q", 1 << 40), "behind the file's end: the file is truncated"),
        (24, struct.pack("<Q", 1 << 63), "behind the file's end"),
        (24, struct.pack("<Q", 0), "its bytes overlap those of token_embd.weight"),
        (24, struct.pack("<Q", 33), "its offset 33 is not aligned to 32"),
        (24, struct.pack("<Q", 32), "llama.cpp wants no gaps"),
    ],
)
def test_what_is_wrong_with_a_tensors_place_is_found(at: int, data: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    whole = bytearray(path.read_bytes())
    place = _info(whole, Q4) + at
    whole[place : place + len(data)] = data
    path.write_bytes(whole)
    found = checked(path)
    assert [what for severity, where, what in found if where == Q4 and says in what and severity == "error"], found


def test_however_long_special_tokens_are_the_file_is_described(tmp_path: Path) -> None:
    """More of them than is kept of a file's values."""
    path, tokens = tmp_path / "f.gguf", 17_000
    token = string(b"a" * 4100)
    with path.open("wb") as file:
        file.write(header(struct.pack("<QQ", 0, 1 + tokens)))
        file.write(string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, tokens))
        for _ in range(tokens):
            file.write(token)
        for index in range(tokens):
            file.write(string(b"tokenizer.ggml.%d_token_id" % index) + struct.pack("<II", 4, index))
    special = inspect(path, numbers=False, check=True).tokenizer["special"]
    assert special["0"] == {"id": 0, "token": "a" * 4096} and len(special) == tokens


def test_names_that_are_there_twice_or_too_long_are_found(tmp_path: Path) -> None:
    long = "n" * 64
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_tensor(long, np.ones(8, np.float32)), ("Q4_0", "Q4_1"))
    data = path.read_bytes()
    key = b"tokenizer.ggml.eos_token_id"
    path.write_bytes(data.replace(b"Q4_1", b"Q4_0").replace(key, b"tokenizer.ggml.bos_token_id"))
    found = checked(path)
    assert ("error", Q4, "2 tensors have this name") in found
    assert ("error", long, "the name has 64 bytes; llama.cpp allows 63") in found
    assert any(where == "tokenizer.ggml.bos_token_id" and "twice" in what for _, where, what in found)


def test_lattice_types_are_known_by_size_and_that_is_said(tmp_path: Path) -> None:
    def lattice(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGMLQuantizationType.IQ2_XS
        writer.add_tensor("w", np.zeros((2, 74), np.uint8), raw_shape=(2, 74), raw_dtype=kind)

    path = write(tmp_path / "f.gguf", lattice)
    assert checked(path) == [("note", "IQ2_XS", "1 tensor is known by its size only; values were not read")]
    found = inspect(path, numbers=True, check=False).tensors[-1]
    assert (found.type, found.bytes, found.shape, found.statistics) == ("IQ2_XS", 148, (2, 256), None)


@pytest.mark.parametrize(
    ("key", "value", "where", "says"),
    [
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model", "missing"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens", "missing"),
        ("tokenizer.ggml.tokens", ["a"], "tokenizer.ggml.tokens", "token_embd.weight has 4 rows"),
        ("tokenizer.ggml.scores", None, "tokenizer.ggml.scores", "missing"),
        ("tokenizer.ggml.scores", [1.0], "tokenizer.ggml.scores", "1 entries for 4 tokens"),
        ("tokenizer.ggml.token_type", None, "tokenizer.ggml.token_type", "missing"),
        ("tokenizer.ggml.eos_token_id", None, "tokenizer.ggml.eos_token_id", "missing"),
        ("tokenizer.ggml.eos_token_id", 9, "tokenizer.ggml.eos_token_id", "9 is none of the 4 tokens"),
        ("tokenizer.ggml.model", "gpt2", "tokenizer.ggml.merges", "gpt2 needs it"),
        ("tokenizer.ggml.model", "gpt2", "tokenizer.ggml.pre", "by a default that may be wrong"),
        ("general.architecture", None, "general.architecture", "missing"),
        ("general.alignment", 33, "general.alignment", "33 (uint32) is no power of 2"),
    ],
)
def test_keys_that_llamacpp_needs_are_missed(key: str, value: object, where: str, says: str, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        if value is None:
            del writer.kv_data[0][key]
        elif key in writer.kv_data[0]:
            writer.kv_data[0][key].value = value
        else:
            writer.add_uint32(key, int(str(value)))

    found = checked(write(tmp_path / "f.gguf", change, ("Q4_0",)))
    assert any(found_where == where and says in what for _, found_where, what in found), found


def test_later_parts_of_a_split_and_other_files_need_no_tokenizer(tmp_path: Path) -> None:
    def part(number: int) -> Change:
        def change(writer: gguf.GGUFWriter) -> None:
            writer.kv_data[0].clear()
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)

        return change

    def projector(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].clear()
        writer.add_string("general.type", "mmproj")

    assert checked(write(tmp_path / "f.gguf", part(1))) == []
    assert checked(write(tmp_path / "f.gguf", part(0)))[0][:2] == ("error", "general.architecture")
    assert [severity for severity, *_ in checked(write(tmp_path / "f.gguf", projector))] == ["note"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_truncated_file_says_so(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: max(30, int(len(data) * share))])
    assert any(severity == "error" and "truncated" in what for severity, _, what in checked(path)) or share == 0.01
    assert checked(path)
    path.write_bytes(data + b"more")
    assert checked(path) == [("warning", "file", "4 bytes follow the last tensor")]


def header(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header(struct.pack("<QQ", 1 << 62, 0)), "tensors are more than any file has"),
        (header(struct.pack("<QQ", 0, 1 << 62)), "keys are more than any file has"),
        (header(struct.pack("<QQQ", 0, 1, 1 << 63), bytes(9)), "key 0 needs 9223372036854775808 bytes, and 9 are left"),
        (header(struct.pack("<QQ", 0, 1), string(b"k"), struct.pack("<IIQ", 9, 8, 1 << 60)), "strings, more than"),
        (header(struct.pack("<QQ", 0, 1), string(b"k"), struct.pack("<IIQ", 9, 0, 1 << 60)), "are left"),
        (header(struct.pack("<QQ", 0, 1), string(b"k"), struct.pack("<IIQ", 9, 9, 1)), "array of type 9"),
        (header(struct.pack("<QQ", 0, 1), string(b"k"), struct.pack("<IQ", 8, 1 << 60)), "are left"),
        (header(struct.pack("<QQ", 0, 1), string(b"\x1b[2J"), struct.pack("<I", 99)), "unknown type 99"),
        (header(struct.pack("<QQ", 1, 0), string(b"t"), struct.pack("<I", 1 << 31), bytes(30)), "at most 4"),
    ],
)
def test_hostile_headers_end_in_one_finding(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(data)
    found = checked(path)
    assert found[0][1].startswith("header, byte ") and says in found[0][2] and found[0][2].isprintable(), found
    assert run(str(path)).exception is not None  # and without --check, too


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF\x03", "does not begin with GGUF and 20 bytes more"),
        (b"PK\x03\x04" + bytes(40), "neither GGUF"),
        (b"", "neither GGUF"),
    ],
)
def test_other_files_are_refused(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=says):
        inspect(path, numbers=False, check=True)
    with pytest.raises(UsageError, match="is no file"):
        inspect(tmp_path / "absent.gguf", numbers=False, check=True)


def test_the_command_shows_all_of_it_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nasty = "[red]:smile:\x1b]0;title\x07\u202eevil"
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_name(nasty))
    done = run(str(path))
    assert done.exit_code == 0 and not (tmp_path / "run").exists()
    assert all(c.isprintable() or c == "\n" for c in done.output)
    assert r"[red]:smile:\x1b]0;title\x07\u202eevil" in done.output
    assert r"{% for m in messages %}\x1b[31m{{ m.content }}" in done.output
    for name in STORED:
        assert any(line.split()[:2] == [f"blk.0.{name}.weight", name] for line in done.output.splitlines())
    assert shown("tab\tΩ") == r"tab\tΩ"
    shortened = run(str(write(tmp_path / "g.gguf", lambda writer: writer.add_array("long", list(range(999))))))
    assert "999 × int32: 0, 1, 2, 3, 4, 5, 6, 7, …" in shortened.output
    recipe = "word " * 30  # without a terminal nothing is folded
    long = run(str(write(tmp_path / "h.gguf", lambda writer: writer.add_string("recipe", recipe))))
    assert any(line.split() == ["recipe", *recipe.split()] for line in long.output.splitlines())


def test_json_and_exit_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", lambda writer: writer.add_float32("nan", float("nan")))
    done = run(str(path), "--json")
    found = json.loads(done.output, parse_constant=lambda name: pytest.fail(name))
    assert done.exit_code == 0 and found["findings"] is None and found["metadata"]["nan"]["value"] == "nan"
    assert found["tensors"][-1]["statistics"]["rms"] > 0
    (row,) = (line.split() for line in run(str(path), "--numbers").output.splitlines() if line.startswith(f"{Q4} "))
    (facts,) = (each for each in found["tensors"] if each["name"] == Q4)
    least, largest = facts["statistics"]["scale_range"]
    assert row[-7:-4] == [f"{least:.3g}", "…", f"{largest:.3g}"] and row[-2] == f"{facts['statistics']['rms']:.4g}"
    assert run(str(path), "--check").output.splitlines()[-1] == "0 errors, 0 warnings"
    _patched(path, Q4, 0, NAN)
    done = run(str(path), "--check")
    assert f"error  {Q4}  1 of 16 blocks have NaN or infinite scales" in done.output.splitlines()
    assert isinstance(done.exception, ArtifactError) and str(done.exception) == f"{path} has 1 error."
    assert json.loads(run(str(path), "--json", "--check").output)["findings"] == [
        {"severity": "error", "where": Q4, "what": "1 of 16 blocks have NaN or infinite scales"}
    ]
    assert run(str(path)).exit_code == 0  # no numbers were read


COLUMNS, ROWS = 64, 8


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A lookup and a product with quantized matrices, float norms inline and beside, as the GenAI layout has it."""
    folder = tmp_path / "model"
    folder.mkdir()
    held = container(FORMATS["Q4_0"])
    assert held is not None
    parts = held.pack(FORMATS["Q4_0"].quantize(weights(ROWS)[:, :COLUMNS].contiguous()))
    affine = container(find_format("UINT4_G32", COLUMNS))
    assert affine is not None
    others = affine.pack(affine.format.quantize(weights(ROWS)[:, :COLUMNS].contiguous() + 1))
    assert others.zeros is not None
    with DataFile(folder / "model.onnx.data") as data:
        initializers = [
            data.put("codes", np.tile(parts.codes.numpy(), (1, 1)).reshape(ROWS, 2, 16)),
            data.put("scales", parts.scales),
            data.put("rows", others.codes),
            data.put("row_scales", others.scales),
            data.put("row_zeros", others.zeros),
            data.put("norm", np.linspace(1, 2, 1024, dtype=np.float32)),
            data.put("other", np.linspace(3, 4, 1024, dtype=np.float32)),
        ]
    nodes = [
        make_node("GatherBlockQuantized", ["rows", "ids", "row_scales", "row_zeros"], ["x"], domain="com.microsoft",
                  bits=4, block_size=32, gather_axis=0, quantize_axis=1),
        make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=COLUMNS, N=ROWS, bits=4,
                  block_size=32),
    ]  # fmt: skip
    ids = make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = make_tensor_value_info("y", TensorProto.FLOAT, ["n", ROWS])
    graph = make_graph(nodes, "g", [ids], [y], initializers)
    opsets = [make_opsetid("", 21), make_opsetid("com.microsoft", 1)]
    onnx.save(make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    genai = {"model": {"type": "llama", "vocab_size": ROWS, "eos_token_id": 2}}
    (folder / "genai_config.json").write_text(json.dumps(genai))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "chat_template": "t"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_an_onnx_folder_is_described(package: Path) -> None:
    found = inspect(package, numbers=True, check=True)
    assert found.findings == []
    product, lookup = (next(t for t in found.tensors if t.name == name) for name in ("codes", "rows"))
    assert (product.type, product.shape, product.bits_per_weight) == ("MatMulNBits 4 bits/32", (ROWS, COLUMNS), 5.0)
    assert lookup.bits_per_weight == 4 + (32 + 4) / 32  # codes, a float scale and four bits of zero point for 32
    values = FORMATS["Q4_0"].dequantize(FORMATS["Q4_0"].quantize(weights(ROWS)[:, :COLUMNS].contiguous()))
    assert product.statistics is not None and lookup.statistics is not None
    assert product.statistics.to_json()["rms"] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    assert product.statistics.largest == float(values.abs().amax())
    assert lookup.statistics.zeros < lookup.weights and lookup.statistics.blocks == 2 * ROWS
    assert found.tokenizer["special"]["eos"] == {"id": 2, "token": "</s>"} and found.tokenizer["size"] == ROWS
    assert found.metadata["opset"].value == {"ai.onnx": 21, "com.microsoft": 1}
    assert found.metadata["genai.type"].value == "llama" and list(found.chat_templates.values()) == ["t"]
    assert run(str(package / "model.onnx"), "--check").exit_code == 0 and run(str(package)).exit_code == 0


def _changed(package: Path, change: Callable[[onnx.ModelProto, dict[str, TensorProto]], object]) -> list:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    change(model, {tensor.name: tensor for tensor in model.graph.initializer})
    onnx.save(model, package / "model.onnx")
    return checked(package)


def _external(tensor: TensorProto, key: str, value: str) -> None:
    next(entry for entry in tensor.external_data if entry.key == key).value = value


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        (lambda m, t: _external(t["norm"], "offset", "9" * 5000), "norm", "which is no place"),
        (lambda m, t: _external(t["norm"], "offset", "99999"), "norm", "ends inside norm: the file is truncated"),
        (lambda m, t: _external(t["norm"], "length", "8"), "norm", "8 bytes; its type and shape need 4096"),
        (lambda m, t: _external(t["norm"], "location", "../x"), "norm", "that is refused"),
        (lambda m, t: _external(t["norm"], "location", "x" * 5000), "norm", "is missing"),
        (lambda m, t: _external(t["other"], "offset", "1030"), "other", "is not aligned to its numbers' 4 bytes"),
        (lambda m, t: _external(t["other"], "offset", "1536"), "other", "its bytes overlap those of norm"),
        (lambda m, t: setattr(t["norm"], "data_type", 99), "norm", "unknown type 99"),
        (lambda m, t: t["norm"].dims.__setitem__(0, -1), "norm", "is impossible"),
        (lambda m, t: t["norm"].dims.extend([2] * 100), "norm", "is impossible"),
        (lambda m, t: setattr(t["other"], "name", "norm"), "norm", "2 initializers have this name"),
        (lambda m, t: setattr(t["scales"], "raw_data", b"\0\0\xc0\x7f" * 16), "codes", "NaN or infinite scales"),
        (lambda m, t: setattr(t["scales"], "raw_data", b"\0" * 64), "codes", "all 512 values are zero"),
        (lambda m, t: setattr(t["scales"], "raw_data", b"\0" * 60), "scales", "60 bytes; its type and shape need 64"),
        (lambda m, t: setattr(m.graph.node[1].attribute[1], "i", 7), "codes", "MatMulNBits: codes have"),
        (lambda m, t: setattr(m.graph.node[1].attribute[3], "i", 24), "codes", "block_size 24 is no power of 2"),
    ],
)
def test_what_is_wrong_with_an_onnx_model_is_found(
    package: Path, change: Callable[[onnx.ModelProto, dict[str, TensorProto]], object], where: str, says: str
) -> None:
    names = {each.name for each in onnx.load(package / "model.onnx", load_external_data=False).graph.node[1].attribute}
    assert names == {"K", "N", "bits", "block_size"}
    found = _changed(package, change)
    assert [what for severity, each, what in found if each == where and says in what and severity == "error"], found


def test_files_beside_a_model_are_missed_and_not_believed(package: Path) -> None:
    (package / "tokenizer.json").unlink()
    (package / "tokenizer_config.json").write_text("[" * 100_000)
    found = {where: what for _, where, what in checked(package)}
    assert "lies beside the model" in found["tokenizer"] and "no JSON" in found["tokenizer_config.json"]
    (package / "model.onnx.data").unlink()
    assert any("is missing: it holds the weights" in what for *_, what in checked(package))


def test_a_model_that_is_parsed_is_bounded_and_its_weights_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    tensor = onnx.numpy_helper.from_array(np.ones((1 << 12, 1 << 10), np.float32), "w")
    graph = make_graph([make_node("Identity", ["w"], ["y"])], "g", [], [], [tensor])
    onnx.save(make_model(graph), path)
    model, ((offset, size),) = read_model(path)
    assert model.ByteSize() < 1000 and size == 1 << 24
    assert path.read_bytes()[offset : offset + 4] == np.float32(1).tobytes()
    assert checked(path) == []
    bomb = b"\x0a\x00" * (5 << 20)  # empty nodes
    path.write_bytes(b"\x3a" + _varint(len(bomb)) + bomb)
    with pytest.raises(ArtifactError, match="cannot be read as ONNX"):
        read_model(path)


def _varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + _varint(number >> 7) if number > 127 else bytes([number])


def _flipped(opened: Path, target: Path, flips: int, seed: int) -> tuple[list[Inspection], int]:
    """Reports and refusals of `target` with up to eight of its bytes changed at a time, until there were `flips`."""
    chance, data, reports, refused = random.Random(seed), target.read_bytes(), [], 0
    while flips > 0:
        damaged = bytearray(data)
        count = chance.choice((1, 2, 4, 8))
        for _ in range(count):
            damaged[chance.randrange(len(data))] = chance.choice((0, 127, 128, 255, chance.randrange(256)))
        flips -= count
        target.write_bytes(damaged)
        try:
            found = inspect(opened, numbers=True, check=True)
        except QronosError as error:
            assert str(error).isprintable()
            refused += 1
            continue
        json.dumps(found.to_json(checked=True), allow_nan=False)
        reports.append(found)
    return reports, refused


def test_flipped_bytes_end_in_a_report_or_an_error(tmp_path: Path, package: Path) -> None:
    """2000 flips here; of a million in a file of every type, and 300,000 in an ONNX graph, none ended otherwise."""
    path = write(tmp_path / "f.gguf", types=("Q4_0", "Q4_K", "NVFP4"))
    reports, _ = _flipped(path, path, flips=1200, seed=1)
    assert sum(bool(found.errors) for found in reports) > 60
    reports, refused = _flipped(package, package / "model.onnx", flips=800, seed=2)
    assert refused > 10 and any(found.errors for found in reports)
