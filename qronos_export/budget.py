"""Memory, operations, disk and seconds of a run, as sums of named terms: the arithmetic.

T tokens, S quantized streams (one a format), h the hidden size, n the inputs of a group, r its rows
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from formats import BlockFormat
from qronos_export.checkpoint import Checkpoint
from qronos_export.layers import together
from qronos_export.recipe import Recipe
from qronos_export.rehearsal import Machine, Rehearsal, searches
from qronos_export.streams import rounder_settings
from qronos_export.survey import Place, Survey
from qronos_export.transformed import SEQUENCES
from qronos_export.transforms import TRANSFORMS, Goal
from qronos_export.workspace import float_bytes, folded_bytes, stored_bytes

_FLOAT = 4
_PASSES = 8  # times that loading, matching and comparing go through the weights
_CHUNK = 1 << 22  # weights whose rows are hashed at a time
_HASHED = 60  # bytes for each of these that glibc's heap grows by: measured on the demo's embedding, 254 MB
_SYMMETRIC, _CROSS = 10 / 16 * 2, 2  # operations for an entry of H, of which 10 of 16 panels are computed, and of G


@dataclass(frozen=True)
class Job:
    """`count` matrices of `rows` × `columns` to be rounded one after another; `heads` of some rows go row by row."""

    fmt: BlockFormat
    rows: int
    columns: int
    count: int = 1
    heads: tuple[int, int] | None = None


class Budget:
    """What the run of `recipe` will take.

    jobs:   by block, by format, by place of the block: what is rounded there.
    outer:  by format, the embedding and a head of its own, where they are rounded.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        seen: Survey,
        jobs: list[list[list[list[Job]]]],
        outer: list[tuple[Job | None, Job | None]],
        machine: Machine,
        device: torch.device,
    ) -> None:
        self._recipe, self._checkpoint, self._seen = recipe, checkpoint, seen
        self._jobs, self._outer, self._machine = jobs, outer, machine
        self._streams = len(outer)
        self._tokens = recipe.samples * recipe.sequence_length
        self._rehearsal = Rehearsal(*rounder_settings(recipe), machine, device)
        self._calibrated = recipe.method != "rtn"
        self._states = self._tokens * seen.hidden * (2 if recipe.state_dtype == "bfloat16" else _FLOAT)  # of one stream
        self._again = recipe.offload != "none"
        self._device = device

    def memory(self) -> dict[str, dict[str, int]]:
        """Moment -> term -> bytes, without the interpreter."""
        moments = dict(self._moments())
        return {name: {term: round(size) for term, size in terms.items() if size} for name, terms in moments.items()}

    def _moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        seen = self._seen
        outside: dict[str, float] = {"embedding and head": seen.outside * _FLOAT}
        largest = max(seen.vocabulary * seen.hidden, max(block.largest for block in seen.blocks))
        yield "matching rows", {**outside, "hashes of rows": _HASHED * min(_CHUNK, largest)}
        if self._calibrated and self._recipe.calibration == "self":
            yield "sampling text", self._sampling()
        if self._recipe.transform_names:
            yield from self._transforms(outside)
        if not self._calibrated:
            outer = [self._rehearsal.nearest(job.fmt, job.rows, job.columns).bytes for job in self._embeddings()]
            weights = _FLOAT * seen.vocabulary * seen.hidden
            yield "embedding", {**outside, "its stored values": weights, "rounding": max(outer, default=0)}
            for block in seen.blocks_by_number:
                yield f"block {block}", {
                    **outside, "block": _FLOAT * seen.blocks[block].weights,
                    "its stored values": _FLOAT * seen.blocks[block].largest,
                    "rounding": max(
                        self._rehearsal.nearest(job.fmt, job.rows, job.columns).bytes for job in self._all(block)
                    ),
                }  # fmt: skip
            return
        arguments = {"masks and positions": seen.arguments}
        states = {"hidden states": 0 if self._recipe.offload == "disk" else (1 + self._streams) * self._states}
        rounded = max(
            (self._rehearsal.nearest(job.fmt, job.rows, job.columns).bytes for job in self._embeddings()), default=0
        )
        yield "embedding", {
            **outside, **arguments, "hidden states": states["hidden states"] * self._streams / (1 + self._streams),
            "its stored values": _FLOAT * seen.vocabulary * seen.hidden, "rounding": rounded,
            "hashes of rows": _HASHED * min(_CHUNK, seen.vocabulary * seen.hidden),
        }  # fmt: skip
        for number in seen.blocks_by_number:
            for moment, terms in self._block(number):
                yield f"block {number}, {moment}", {**outside, **arguments, **states, **terms}
        if heads := [head for _, head in self._outer if head]:
            yield "head", {
                **outside, **arguments, **states,
                "its stored values": _FLOAT * seen.vocabulary * seen.hidden,
                "statistics": self._statistics(seen.hidden),
                "rounding": max(self._rehearsal.rounding(job.fmt, job.rows, job.columns).bytes for job in heads),
                "hashes of rows": _HASHED * min(_CHUNK, seen.vocabulary * seen.hidden),
            }  # fmt: skip

    def _block(self, number: int) -> Iterator[tuple[str, dict[str, float]]]:
        recipe, block = self._recipe, self._seen.blocks[number]
        at_once = min(recipe.micro_batch, recipe.samples)
        streams = 1 + self._streams
        weights: dict[str, float] = {
            "block, once per stream": streams * _FLOAT * block.weights,
            "hashes of rows": _HASHED * min(_CHUNK, block.largest),
        }
        for place_number, place in enumerate(block.places):
            waiting = self._waiting(place, streams)
            waiting += sum(p.payload.of(at_once, recipe.sequence_length) for p in block.places[place_number + 1 :])
            rounding = max(
                (
                    self._rehearsal.rounding(job.fmt, job.rows, job.columns, self._heads(job)).bytes
                    for format in self._jobs[number]
                    for job in format[place_number]
                ),
                default=0,
            )
            rounding *= together(place.experts, place.columns, self._device)
            forward = place.between.of(at_once, recipe.sequence_length)
            forward -= place.held.of(at_once, recipe.sequence_length)
            statistics = max(1, place.experts) * self._statistics(place.columns, self._written(place))
            name = next(iter(place.matrices)).removesuffix(".weight")
            yield (
                name,
                {
                    **weights,
                    "forwards that wait": waiting,
                    "statistics": statistics,
                    **(
                        {"rounding": rounding}
                        if rounding >= forward + statistics
                        else {"one forward": forward, "statistics as sums in float64": statistics}
                    ),
                },
            )
        if block.places:
            last = block.places[-1]
            yield (
                "output",
                {
                    **weights,
                    "forwards that wait": self._waiting(last, self._streams),
                    "new hidden states": 0 if self._again else self._states,
                    "one forward": block.after.of(at_once, recipe.sequence_length),
                },
            )

    def _waiting(self, place: Place, streams: int) -> float:
        """Of forwards that wait at a place in so many streams; where they are run anew, one in two streams, with what
        they began with."""
        recipe = self._recipe
        if not self._again:
            return streams * place.held.of(recipe.samples, recipe.sequence_length)
        at_once = min(recipe.micro_batch, recipe.samples)
        entered = _FLOAT * at_once * recipe.sequence_length * self._seen.hidden
        return 2 * (entered + place.held.of(at_once, recipe.sequence_length))

    def _statistics(self, columns: int, written: int = 0) -> float:
        """H, G and D, once more for tokens held out."""
        return (2 if self._recipe.held_out else 1) * _FLOAT * (2 * columns + written) * columns

    def _written(self, place: Place) -> int:
        """Rows that look as if they wrote to the residual stream, where that counts."""
        alone = len(place.matrices) == 1 and not place.experts and place.rows == self._seen.hidden
        return place.rows if self._recipe.corrects_stream and alone else 0

    def _sampling(self) -> dict[str, float]:
        """The whole model, its cache twice while it grows, and what becomes of logits on their way to a token."""
        at_once = min(self._recipe.samples, self._seen.sampled)
        keys = sum(block.keys for block in self._seen.blocks)
        cache = _FLOAT * at_once * self._recipe.sequence_length * keys
        return {
            "whole model": _FLOAT * self._weights,
            "its cache": cache + cache / len(self._seen.blocks),
            "logits": 4 * _FLOAT * at_once * self._seen.vocabulary,
        }

    def _transforms(self, outside: dict[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
        names, seen, recipe = self._recipe.transform_names, self._seen, self._recipe
        transforms = {name: TRANSFORMS[name](Goal("Q4_0", 0)) for name in names}
        if any(each.learns for each in transforms.values()):
            yield "transforms: learning", {"whole model, its gradients and rounded copy": 3 * _FLOAT * self._weights}
        if any(each.unties for each in transforms.values()) and seen.tied:
            outside = {"embedding and head": 2 * outside["embedding and head"]}
        yield "transforms: writing", {**outside, "bytes on their way to a file": outside["embedding and head"]}
        block = max(seen.blocks, key=lambda each: each.weights)
        some = min(SEQUENCES, recipe.samples) if any(each.needs_inputs for each in transforms.values()) else 0
        widths = [place.columns for place in block.places for _ in range(max(1, place.experts))]
        searched = [
            self._rehearsal.factors(name, recipe.formats[0], max(widths)).bytes for name in names if searches(name)
        ]
        yield (
            "transforms: block",
            {
                **outside,
                "block": _FLOAT * block.weights,
                "hidden states": _FLOAT * some * recipe.sequence_length * seen.hidden,
                "statistics": _FLOAT * sum(n**2 for n in widths) if some else 0,
                "search": max(searched, default=2 * 2 * _FLOAT * block.largest),
            },
        )

    def flops(self) -> dict[str, float]:
        """Of forwards, statistics and the products of rounding."""
        forwards = statistics = rounding = 0.0
        for number, block in enumerate(self._seen.blocks):
            if self._calibrated:
                of = self._recipe.samples, self._recipe.sequence_length
                forwards += (1 + self._streams) * block.flops.of(*of)
                for place in block.places:
                    forwards += 2 * self._streams * place.flops.of(*of) if self._again else 0.0
                    tokens = self._tokens * (self._seen.routed if place.experts else 1)
                    statistics += self._streams * (_SYMMETRIC + _CROSS) * place.columns**2 * tokens
                    statistics += self._streams * _CROSS * self._written(place) * place.columns * tokens
            for job in self._all(number):
                rounding += job.count * _rounding_flops(job) if self._calibrated else 0.0
        for _, head in self._outer:
            if head and self._calibrated:
                statistics += (_SYMMETRIC + _CROSS) * head.columns**2 * self._tokens
                rounding += _rounding_flops(head)
        return {"forwards": forwards, "statistics": statistics, "rounding": rounding}

    def disk(self, files: int) -> dict[str, int]:
        """Bytes needed at most in the output folder: float files on the way, blocks twice while a file is written."""
        checkpoint, recipe = self._checkpoint, self._recipe
        needed = {"float file": 0 if checkpoint.float_gguf else stored_bytes(checkpoint)}
        if recipe.transform_names:
            needed["transformed checkpoint"] = folded_bytes(recipe, checkpoint)
            needed["its float file"] = float_bytes(checkpoint)
        if [each for each in recipe.artifacts if each != "gguf"]:
            needed["ONNX builder's graph"] = 2 * float_bytes(checkpoint)
        if recipe.offload == "disk" and self._calibrated:
            needed["hidden states"] = (1 + self._streams) * self._states
        return needed | {"blocks": files, "files": files}

    def seconds(self, files: int, converted: float) -> dict[str, float]:
        """By phase, as in a report. `converted`: what the converter took to write the header."""
        machine, seen, recipe = self._machine, self._seen, self._recipe
        flops, weights = self.flops(), self._weights
        rate = machine.bfloat16 if recipe.compute_dtype == "bfloat16" else machine.float32
        passes = weights * _FLOAT / machine.memory
        spent = {"load": converted + stored_bytes(self._checkpoint) / machine.disk + _PASSES * passes}
        if self._calibrated and recipe.calibration == "self":
            at_once = min(recipe.samples, seen.sampled)
            steps = -(-recipe.samples // at_once) * recipe.sequence_length
            spent["calibration"] = steps * max(passes, 2 * weights * at_once / machine.float32)
        if names := recipe.transform_names:
            share = min(1.0, SEQUENCES / recipe.samples)
            squares = sum(2 * p.columns**2 for block in seen.blocks for p in block.places)
            search = sum(
                self._rehearsal.factors(name, recipe.formats[0], place.columns).seconds * max(1, place.experts)
                for name in names if searches(name) for block in seen.blocks for place in block.places
            )  # fmt: skip
            spent["transforms"] = (
                search + converted + 2 * float_bytes(self._checkpoint) / machine.disk + _PASSES * passes
                + share * (flops["forwards"] / (1 + self._streams) / rate + squares * self._tokens / machine.float32)
            )  # fmt: skip
        spent["forward"] = flops["forwards"] / rate
        spent["statistics"] = flops["statistics"] / machine.float32
        spent["rounding"] = sum(self._rounding_seconds())
        spent["write"] = files / machine.disk + self._streams * _PASSES * passes
        return spent

    def _rounding_seconds(self) -> Iterator[float]:
        for job in self._embeddings():
            yield self._rehearsal.nearest(job.fmt, job.rows, job.columns).seconds
        for number in range(len(self._seen.blocks)):
            yield from (self._seconds(job) for job in self._all(number))
        yield from (self._seconds(head) for _, head in self._outer if head)

    def _seconds(self, job: Job) -> float:
        if not self._calibrated:
            return job.count * self._rehearsal.nearest(job.fmt, job.rows, job.columns).seconds
        return job.count * self._rehearsal.rounding(job.fmt, job.rows, job.columns, self._heads(job)).seconds

    def notes(self) -> list[str]:
        """What the numbers leave out."""
        recipe, notes = self._recipe, []
        if any(name == "NVFP4" for name in recipe.formats):
            notes.append("NVFP4 may put a `.scale` of 4 bytes, and its entry in the header, beside a tensor.")
        if recipe.transforms == "auto" and recipe.transform_names:
            notes.append("A model that equalize does not fit goes without it.")
        if [each for each in recipe.artifacts if each != "gguf"]:
            notes.append("ONNX: sizes, memory and time of its builder and of validation are not in here.")
        if recipe.online_names or recipe.activations != "none" or recipe.kv_cache:
            notes.append("Rounding of activations, keys and values takes time that is not in here.")
        return notes

    @property
    def _weights(self) -> int:
        return self._seen.outside + sum(block.weights for block in self._seen.blocks)

    def _embeddings(self) -> list[Job]:
        return [embedding for embedding, _ in self._outer if embedding]

    def _all(self, number: int) -> Iterator[Job]:
        for format in self._jobs[number]:
            for place in format:
                yield from place

    def _heads(self, job: Job) -> tuple[int, int] | None:
        return job.heads if self._recipe.couples_rows else None


def _rounding_flops(job: Job) -> float:
    """Two factorizations, an inverse, two solves; drift, sweep, power."""
    return 5 / 3 * job.columns**3 + 7 * job.rows * job.columns**2
