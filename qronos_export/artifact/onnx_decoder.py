"""onnxruntime's own operators of a decoder said in standard ones: norms, rotary position embedding, grouped attention
with a cache of keys and values.

A token's position is the number of tokens before it that `attention_mask` counts, and it attends to those and itself;
so batches padded on the left work as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto
from onnx.helper import get_attribute_value, make_node

from qronos_export.errors import ArtifactError

if TYPE_CHECKING:
    from qronos_export.artifact.onnx_graph import Style

_LOWEST = float(np.finfo(np.float32).min)


class Decoder:
    """Says nodes of the builder's graph in `style`: heads have `head_size` numbers, tables of the graph `widths`."""

    def __init__(self, style: Style, head_size: int, widths: Mapping[str, int]) -> None:
        self._style = style
        self._head_size = head_size
        self._widths = widths
        self._said: set[str] = set()

    def add(self, node: NodeProto) -> None:
        """Raises ArtifactError for what has no standard form here."""
        attributes = {each.name: get_attribute_value(each) for each in node.attribute}
        if node.op_type == "SimplifiedLayerNormalization":
            self._norm(node.input[0], node.input[1], node.output[0], attributes["epsilon"])
        elif node.op_type == "SkipSimplifiedLayerNormalization" and len([*filter(None, node.input)]) == 3:
            total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}/skip"
            self._style.add("Add", node.input[:2], total)
            self._norm(total, node.input[2], node.output[0], attributes["epsilon"])
        elif node.op_type == "GroupQueryAttention":
            self._attention(node, attributes)
        elif node.domain:
            raise ArtifactError(
                f"{node.name} of this model is {node.op_type} of {node.domain}, for which we have no standard form; "
                "use --artifact onnx."
            )
        else:
            self._style.nodes.append(node)

    def _norm(self, x: str, gain: str, y: str, epsilon: float) -> None:
        add, constant = self._style.add, self._style.constant
        power = add("Pow", [x, constant(2.0, np.float32)], f"{y}/square")
        mean = add("ReduceMean", [power, constant([-1])], f"{y}/mean", keepdims=1)
        root = add("Sqrt", [add("Add", [mean, constant(epsilon, np.float32)], f"{y}/more")], f"{y}/root")
        add("Mul", [add("Div", [x, root], f"{y}/even"), gain], y)

    def _attention(self, node: NodeProto, attributes: dict[str, Any]) -> None:
        """softmax(q kᵀ · scale + mask) v, heads of q in groups that share one of k and v."""
        add, constant, y = self._style.add, self._style.constant, node.output[0]
        query, key, value, past_key, past_value, _, _, cos, sin, *rest = node.input
        if any(rest) or attributes.get("rotary_interleaved") or attributes.get("smooth_softmax"):
            raise ArtifactError(f"{node.name} attends in a way that has no standard form here; use --artifact onnx.")
        heads, kv_heads, size = attributes["num_heads"], attributes["kv_num_heads"], self._head_size
        if not key:
            query, key, value = self._split(query, [heads * size, kv_heads * size, kv_heads * size], f"{y}/qkv")

        def by_head(x: str, count: int, name: str) -> str:
            rows = add("Reshape", [x, constant([0, 0, count, size])], f"{name}/rows")
            return add("Transpose", [rows], f"{name}/heads", perm=[0, 2, 1, 3])

        q, k, v = by_head(query, heads, f"{y}/q"), by_head(key, kv_heads, f"{y}/k"), by_head(value, kv_heads, f"{y}/v")
        if attributes.get("do_rotary"):
            q, k = (self._rotated(x, cos, sin, f"{x}/turned") for x in (q, k))
        k = add("Concat", [past_key, k], node.output[1], axis=2)
        v = add("Concat", [past_value, v], node.output[2], axis=2)
        # [batch, kv head, heads that share it, tokens, size]; of keys and values one for all that share it.
        q = add("Reshape", [q, constant([0, kv_heads, heads // kv_heads, -1, size])], f"{y}/q/groups")
        k, v = (add("Unsqueeze", [x, constant([2])], f"{y}/{name}/groups") for x, name in ((k, "k"), (v, "v")))
        scores = add("MatMul", [q, add("Transpose", [k], f"{y}/k/turned", perm=[0, 1, 2, 4, 3])], f"{y}/products")
        scale = attributes.get("scale") or size**-0.5
        scores = add("Mul", [scores, constant(scale, np.float32)], f"{y}/scores")
        if softcap := attributes.get("softcap"):
            cap = constant(softcap, np.float32)
            scores = add("Tanh", [add("Div", [scores, cap], f"{y}/capped/share")], f"{y}/capped/tanh")
            scores = add("Mul", [scores, cap], f"{y}/capped")
        scores = add("Add", [scores, self._mask(attributes.get("local_window_size", -1))], f"{y}/masked")
        read = add("MatMul", [add("Softmax", [scores], f"{y}/weights", axis=-1), v], f"{y}/read")
        read = add("Reshape", [read, constant([0, heads, -1, size])], f"{y}/read/heads")
        read = add("Transpose", [read], f"{y}/read/tokens", perm=[0, 2, 1, 3])
        add("Reshape", [read, constant([0, 0, heads * size])], y)

    def _rotated(self, x: str, cos: str, sin: str, y: str) -> str:
        """`x` [batch, head, token, size] turned by its tokens' positions; number i goes with number i + half."""
        add, half = self._style.add, self._widths[cos]
        rest: list[str] = []
        if 2 * half < self._head_size:
            x, *rest = self._split(x, [2 * half, self._head_size - 2 * half], f"{y}/part")
        a, b = self._split(x, [half, half], f"{y}/half")
        c, s = self._of_positions(cos), self._of_positions(sin)
        minus = [add("Mul", [a, c], f"{y}/ac"), add("Mul", [b, s], f"{y}/bs")]
        plus = [add("Mul", [b, c], f"{y}/bc"), add("Mul", [a, s], f"{y}/as")]
        return add("Concat", [add("Sub", minus, f"{y}/first"), add("Add", plus, f"{y}/second"), *rest], y, axis=-1)

    def _split(self, x: str, sizes: list[int], name: str) -> list[str]:
        parts = [f"{name}_{n}" for n in range(len(sizes))]
        self._style.nodes.append(make_node("Split", [x, self._style.constant(sizes)], parts, name=name, axis=-1))
        return parts

    def _once(self, name: str, say: Callable[[str], str]) -> str:
        """What all layers share is said by the first."""
        if name not in self._said:
            self._said.add(name)
            say(name)
        return name

    def _of_positions(self, table: str) -> str:
        """Rows of `table` for the tokens given: [batch, 1, tokens, width]."""
        add, constant = self._style.add, self._style.constant

        def say(name: str) -> str:
            rows = add("Gather", [table, self._once("/positions", self._positions)], f"{name}/rows")
            return add("Unsqueeze", [rows, constant([1])], name)

        return self._once(f"/{table}/of_positions", say)

    def _positions(self, name: str) -> str:
        """int64 [batch, tokens]."""
        add, constant = self._style.add, self._style.constant
        counted = add("CumSum", ["attention_mask", constant(1)], f"{name}/counted")
        all_of_them = add("Max", [add("Sub", [counted, constant(1)], f"{name}/before"), constant(0)], f"{name}/all")
        past = self._once("/past", self._past)
        total = add("Shape", ["attention_mask"], f"{name}/total", start=1)
        return add("Slice", [all_of_them, past, total, constant([1])], name)

    def _past(self, name: str) -> str:
        """int64 [1]: tokens in the cache."""
        add = self._style.add
        total = add("Shape", ["attention_mask"], f"{name}/total", start=1)
        return add("Sub", [total, add("Shape", ["input_ids"], f"{name}/tokens", start=1)], name)

    def _mask(self, window: int) -> str:
        """What is added to scores, float32 [batch, 1, 1, tokens, total]: the lowest for what it may not see."""
        add, constant = self._style.add, self._style.constant

        def say(name: str) -> str:
            past = add("Squeeze", [self._once("/past", self._past)], f"{name}/past")
            total = add("Squeeze", [add("Shape", ["attention_mask"], f"{name}/shape", start=1)], f"{name}/total")
            every = add("Range", [constant(0), total, constant(1)], f"{name}/every")
            own = add(
                "Unsqueeze", [add("Range", [past, total, constant(1)], f"{name}/own"), constant([1])], f"{name}/rows"
            )
            seen = add("LessOrEqual", [every, own], f"{name}/seen")
            if window > 0:
                near = add("Greater", [every, add("Sub", [own, constant(window)], f"{name}/far")], f"{name}/near")
                seen = add("And", [seen, near], f"{name}/seen_near")
            real = add("Cast", ["attention_mask"], f"{name}/real", to=TensorProto.BOOL)
            real = add("Unsqueeze", [real, constant([1, 2, 3])], f"{name}/real_of_rows")
            seen = add("And", [seen, real], f"{name}/allowed")
            return add("Where", [seen, constant(0.0, np.float32), constant(_LOWEST, np.float32)], name)

        return self._once(f"/mask/{window}", say)
