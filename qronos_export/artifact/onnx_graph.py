"""A graph of float matrices opened for surgery: what multiplies with which matrix, and the graph again with quantized
ones in their place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor

from formats import BlockFormat
from qronos_export.artifact.onnx_blocks import Container, Parts, container
from qronos_export.artifact.onnx_data import DataFile, read, renamed
from qronos_export.errors import ArtifactError


class Piece:
    """Consecutive rows of a matrix: `blocks` uint8 [rows, row_bytes] of `fmt`, whose values count `factor` times.

    key: what tells these numbers from others: equal keys, equal bytes.
    """

    def __init__(
        self, key: object, fmt: BlockFormat, shape: tuple[int, int], blocks: Callable[[], Tensor], factor: float = 1.0
    ) -> None:
        self.key = key
        self.format = fmt
        self.rows, self.columns = shape
        self.container = container(fmt)
        """What holds them exactly; None where they are floats, or become floats since no integers hold them."""
        self.blocks = blocks
        self._factor = factor

    def parts(self) -> Parts:
        assert self.container is not None
        return self.container.pack(self.blocks(), self._factor)

    def floats(self) -> Tensor:
        """Float32 [rows, columns]."""
        return self.format.dequantize(self.blocks()) * self._factor


class Opened:
    """A model of the builder's: its proto, and its matrices."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.model: ModelProto = onnx.load(path, load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        uses: dict[str, list[str]] = {}
        for node in self.model.graph.node:
            for place, name in enumerate(node.input):
                if name in self.tensors and len(self.tensors[name].dims) > 1:
                    uses.setdefault(name, []).append(f"{node.op_type} {place}")
        self.products = [name for name, kinds in uses.items() if kinds == ["MatMul 1"]]
        self.lookups = [name for name, kinds in uses.items() if kinds == ["Gather 0"]]

    def vectors(self) -> list[Tensor]:
        """Its norms, biases and other initializers of one dimension."""
        kinds = TensorProto.FLOAT, TensorProto.FLOAT16
        flat = [each for each in self.tensors.values() if len(each.dims) == 1 and each.data_type in kinds]
        return [torch.from_numpy(read(each, self.folder)).float() for each in flat]

    def matrices(self) -> dict[str, Tensor]:
        """Float32 [out, in] each, rows as in a linear layer or an embedding; mapped, not in memory."""
        found = {name: torch.from_numpy(read(self.tensors[name], self.folder)) for name in self.lookups}
        return found | {name: torch.from_numpy(read(self.tensors[name], self.folder)).T for name in self.products}


class Style(ABC):
    """How the new graph says things. Collects its nodes and initializers, from the first node to the last."""

    opset = 21

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._written: dict[object, TensorProto] = {}
        self._sums: set[str] = set()
        self._held: tuple[Piece, Parts] | None = None

    @abstractmethod
    def scaled_product(self, name: str, x: str, y: str, piece: Piece, container: Container) -> None:
        """`y` = `x` times the transposed piece, offsets left out. `name` begins the names of initializers."""

    @abstractmethod
    def scaled_lookup(self, name: str, ids: str, y: str, piece: Piece, container: Container) -> None:
        """`y` = rows `ids` of the piece, offsets left out."""

    @abstractmethod
    def scaled_copies(self, piece: Piece, container: Container) -> Iterator[Tensor]:
        """What each copy of the piece's codes in the data file stands for, offsets with them."""

    def other(self, node: NodeProto) -> None:
        """A node of the float graph that meets no matrix."""
        self.nodes.append(node)

    def product(self, name: str, x: str, y: str, piece: Piece) -> None:
        """`y` = `x` times the transposed piece."""
        if piece.container is None:
            shape = piece.columns, piece.rows
            self.add("MatMul", [x, self.put(name, (piece.key, "transposed"), lambda: piece.floats().T, shape)], y)
        elif not piece.container.offset:
            self.scaled_product(name, x, y, piece, piece.container)
        else:
            self.scaled_product(name, x, f"{y}/scaled", piece, piece.container)
            self._add_offsets(name, x, y, piece, piece.container.group)

    def _add_offsets(self, name: str, x: str, y: str, piece: Piece, group: int) -> None:
        """`y` = what is scaled + (Σ over each group of `x`) offsetᵀ."""
        groups = piece.columns // group
        sums = f"{x}/sums_of_{group}"
        if sums not in self._sums:
            self._sums.add(sums)
            grouped = self.add("Reshape", [x, self.constant([0, 0, groups, group])], f"{x}/groups_of_{group}")
            self.add("ReduceSum", [grouped, self.constant([3])], sums, keepdims=0)
        key, shape = (piece.key, "offsets transposed"), (groups, piece.rows)
        offsets = self.put(f"{name}_offsets", key, lambda: self._offsets(piece).T, shape)
        self.add("Add", [f"{y}/scaled", self.add("MatMul", [sums, offsets], f"{y}/offset")], y)

    def lookup(self, name: str, ids: str, y: str, piece: Piece) -> None:
        """`y` = rows `ids` of the piece."""
        if piece.container is None:
            self.add(
                "Gather", [self.put(name, (piece.key, "floats"), piece.floats, (piece.rows, piece.columns)), ids], y
            )
        elif not piece.container.offset:
            self.scaled_lookup(name, ids, y, piece, piece.container)
        else:
            self.scaled_lookup(name, ids, f"{y}/scaled", piece, piece.container)
            self._look_up_offsets(name, ids, y, piece, piece.container.group)

    def _look_up_offsets(self, name: str, ids: str, y: str, piece: Piece, group: int) -> None:
        groups = piece.columns // group
        key, shape = (piece.key, "offsets"), (piece.rows, groups)
        offsets = self.put(f"{name}_offsets_of_rows", key, lambda: self._offsets(piece), shape)
        each = self.add("Gather", [offsets, ids], f"{y}/offset")
        each = self.add("Unsqueeze", [each, self.constant([3])], f"{y}/offset_column")
        grouped = self.add("Reshape", [f"{y}/scaled", self.constant([0, 0, groups, group])], f"{y}/groups")
        both = self.add("Add", [grouped, each], f"{y}/sum")
        self.add("Reshape", [both, self.constant([0, 0, piece.columns])], y)

    def _offsets(self, piece: Piece) -> Tensor:
        offsets = self.parts(piece).offsets
        assert offsets is not None
        return offsets

    def verify(self, piece: Piece) -> None:
        """Read the numbers of a written piece back from the data file. Raises ArtifactError where they stand for other
        values than its blocks."""
        floats = piece.floats()
        same = [torch.equal(values, floats) for values in self.copies(piece)]
        if not same or not all(same):
            raise ArtifactError(f"{self.data.path} does not hold the values of {piece.key}.")

    def copies(self, piece: Piece) -> Iterator[Tensor]:
        """What each copy of the piece in the data file stands for: float32 [rows, columns]."""
        if piece.container is not None:
            yield from self.scaled_copies(piece, piece.container)
        if (floats := self.read((piece.key, "floats"))) is not None:
            yield floats.view(piece.rows, piece.columns)
        if (floats := self.read((piece.key, "transposed"))) is not None:
            yield floats.view(piece.columns, piece.rows).T

    def read(self, key: object) -> Tensor | None:
        """Written numbers, flat; None where nothing was written for `key`."""
        tensor = self._written.get(key)
        return None if tensor is None else torch.from_numpy(read(tensor, self.data.path.parent).reshape(-1))

    def require(self, key: object) -> Tensor:
        found = self.read(key)
        assert found is not None
        return found

    def parts(self, piece: Piece) -> Parts:
        """In its container; the last one asked for is kept."""
        if self._held is None or self._held[0] is not piece:
            self._held = piece, piece.parts()
        return self._held[1]

    def add(self, kind: str, inputs: Iterable[str], output: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output, named like it; returns the output."""
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, numbers: Any, kind: type = np.int64) -> str:
        """The name of a small constant; equal ones are one."""
        name = f"/constants/{kind.__name__}/{numbers}".replace(" ", "")
        if name not in self.initializers:
            self.initializers[name] = self.data.put(name, np.array(numbers, kind))
        return name

    def put(
        self,
        name: str,
        key: object,
        numbers: Callable[[], np.ndarray | Tensor | None],
        dims: Sequence[int],
        kind: int | None = None,
    ) -> str:
        """An initializer of shape `dims`, of ONNX's type `kind` where it is not the numbers' own; returns its name. Of
        equal `key` the bytes are written once."""
        if name not in self.initializers:
            if key in self._written:
                self.initializers[name] = renamed(self._written[key], name, dims)
            else:
                found = numbers()
                assert found is not None
                self._written[key] = self.initializers[name] = self.data.put(name, found, dims, kind)
        return name


def rewritten(opened: Opened, pieces: Mapping[str, Sequence[Piece]], style: Style) -> ModelProto:
    """The model in `style`, with `pieces`, by matrix, in place of its matrices. A looked-up matrix is one piece.

    Raises ArtifactError for an operator that the style's opset does not have as the builder means it.
    """
    graph = opened.model.graph
    for node in graph.node:
        name = next((name for name in node.input if name in pieces), None)
        if name is None:
            style.other(node)
        elif name in opened.lookups:
            (piece,) = pieces[name]
            style.lookup(name, node.input[1], node.output[0], piece)
        elif len(pieces[name]) == 1:
            style.product(name, node.input[0], node.output[0], pieces[name][0])
        else:
            outputs = [f"{node.output[0]}/part_{n}" for n in range(len(pieces[name]))]
            for n, piece in enumerate(pieces[name]):
                style.product(f"{name}/part_{n}", node.input[0], outputs[n], piece)
            style.add("Concat", outputs, node.output[0], axis=-1)
    nodes = _needed(style.nodes, [each.name for each in graph.output])
    builders = [each.version for each in opened.model.opset_import if not each.domain]
    _check_opset(nodes, style.opset, max(style.opset, *builders))
    used = {name for node in nodes for name in node.input}
    for name, tensor in opened.tensors.items():
        if name in used and name not in style.initializers:
            style.initializers[name] = style.data.put(name, read(tensor, opened.folder))
    initializers = [tensor for name, tensor in style.initializers.items() if name in used]
    fresh = onnx.helper.make_graph(nodes, graph.name, graph.input, graph.output, initializers)
    domains = {"": style.opset} | {node.domain: 1 for node in nodes if node.domain}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()]
    ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return onnx.helper.make_model(fresh, opset_imports=opsets, ir_version=ir_version, producer_name="qronos-export")


def _check_opset(nodes: Iterable[NodeProto], opset: int, newest: int) -> None:
    """Raises ArtifactError for an operator, also within others, which from `opset` to `newest` became another."""
    for node in nodes:
        name = node.op_type
        if not node.domain and onnx.defs.has(name):  # the builder has some of onnxruntime's own in the standard domain
            there = onnx.defs.has(name, newest)
            since = (onnx.defs.get_schema(name, newest) if there else onnx.defs.get_schema(name)).since_version
            if since > opset:
                raise ArtifactError(
                    f"{node.name or node.output[0]} of the graph is the {name} of opset {since}, and what is "
                    f"written is of opset {opset}. Use --artifact gguf, or another onnxruntime-genai."
                )
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _check_opset(graph.node, opset, newest)


def _needed(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Of `nodes`, in order, those that `outputs` depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
