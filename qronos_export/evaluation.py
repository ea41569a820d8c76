"""Quality in torch, without a file: perplexity and KL divergence by llama.cpp's protocol, and what zero-shot tasks
score; also for grids and for activations that no file or no runtime has.

Held-out sequences ride along in the streams of a calibration, so there is one pass and no second copy of the model. All
linear layers of the blocks get the recipe's type; embedding and head stay float, as in the literature. Tasks alone
need the model whole.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import BlockFormat, FormatError, find_format
from qronos_export import calibration
from qronos_export.activations import activation, check_activations
from qronos_export.artifact.gguf import StoredTensor, Target
from qronos_export.attention import check_attention
from qronos_export.calibration import Clock
from qronos_export.checkpoint import LazyModel, load_whole, open_checkpoint, round_cache, tokenizer
from qronos_export.corpus import calibration_tokens, held_out_tokens
from qronos_export.decoder import Decoder, advance, enter
from qronos_export.device import pick_device
from qronos_export.errors import OutputError, UsageError
from qronos_export.events import Event, Stage, Step
from qronos_export.folding import fold
from qronos_export.layers import Store
from qronos_export.memory import give_back
from qronos_export.online import Online, online_model
from qronos_export.plan import Mix
from qronos_export.precision import linear
from qronos_export.proof import Held, held_out_file
from qronos_export.recipe import Recipe
from qronos_export.residual import NO_WRITERS
from qronos_export.resolved import matched
from qronos_export.streams import Passengers, calibrate, rounded_cache
from qronos_export.suspended import Block
from qronos_export.tasks import Scores, Suite
from qronos_export.transformed import PROBE, need_inputs
from qronos_export.workspace import check_space, folded_bytes


@dataclass(frozen=True)
class Evaluation:
    """A model on a text, and next to it what a recipe makes of it (None without one). Divergences are nats per scored
    token, `same_top` percent, errors one standard deviation."""

    perplexity_reference: float
    perplexity_reference_error: float
    context: int
    chunks: int
    perplexity: float | None = None
    perplexity_error: float | None = None
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    same_top: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluated:
    """`notes` say what was done otherwise than the recipe has it: a transform left out, a layer rounded to nearest.
    `scores_reference` and `scores` are the float model's and the recipe's on tasks, None where none were asked for."""

    evaluation: Evaluation
    recipe: Recipe | None
    notes: list[str] = field(default_factory=list)
    scores_reference: Scores | None = None
    scores: Scores | None = None


def evaluate(
    model: str,
    recipe: Recipe | None,
    held: Held,
    *,
    tasks: Sequence[str] = (),
    tasks_folder: Path | None = None,
    device: str = "auto",
    micro_batch: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Event | Evaluated]:
    """Perplexity of `model` on held-out text; with a recipe also its own and the KL divergence. Ends with Evaluated.

    tasks: lm-eval's names, or names in the YAML files of `tasks_folder`; both models are scored on them.
    Raises UsageError for a format of the recipe that is no single type, CalibrationError for texts that are too short,
    TransformError for what does not fit the model, TaskError for tasks that cannot be read or run, OutputError for
    scratch space that is too small.
    """
    suite, scores_reference, scores = None, None, None
    if tasks:
        yield Stage("tasks")
        suite = Suite(tasks, tasks_folder)
    yield Stage("load")
    where = pick_device(recipe.device if recipe and device == "auto" else device)
    checkpoint = open_checkpoint(model)
    kind = partial(online_model, recipe.online_names if recipe else ())
    if recipe:
        recipe = matched(recipe, checkpoint)
        _check(recipe, kind(checkpoint, where))
    with _scratch() as folder:
        if recipe:
            check_space(folder, folded_bytes(recipe, checkpoint))
        tokens = held_out_tokens(held_out_file(held, folder), checkpoint, held.context, held.chunks).to(where)
        if suite:
            yield Stage("tasks: float model")
            scores_reference = suite.scores(
                load_whole(checkpoint, where), tokenizer(checkpoint), micro_batch=micro_batch, on_progress=on_progress
            )
            give_back()
        if recipe is None:
            yield Stage("float model")
            measured = _of_floats(LazyModel(checkpoint, where), tokens, micro_batch)
            yield Evaluated(measured, None, scores_reference=scores_reference)
            return
        drawn = PROBE.to(where)
        if recipe.method != "rtn" or recipe.magr or need_inputs(recipe.transform_names):
            yield Stage("calibration text")
            drawn = calibration_tokens(
                recipe.calibration, checkpoint, samples=recipe.samples, length=recipe.sequence_length,
                seed=recipe.seed, device=where, on_progress=on_progress,
            ).tokens.to(where)  # fmt: skip
        yield Stage("transforms")
        folded = fold(recipe, checkpoint, drawn, folder, kind=kind, on_progress=on_progress)
        lazy = kind(folded.checkpoint, where)
        whole = Whole(lazy, recipe) if suite else None
        plan, output = _everything(lazy, recipe, whole or _Nowhere())
        riding = Passengers(tokens)
        notes = list(folded.notes)
        yield Stage("layers", len(output.mix.quantized))
        rounded = calibrate(lazy, plan, [output], drawn, recipe, Clock(), riding, folder=folder)
        corrected = False
        for done, layer in enumerate(rounded, start=1):
            if layer.note:
                notes.append(f"{layer.name}: {layer.note}")
            corrected |= layer.residual
            yield Step(done, layer)
        if recipe.residual_aware and not corrected:
            notes.append(NO_WRITERS)
        yield Stage("scores")
        measured = _compare(lazy, riding, held.context)
        if suite and whole:
            yield Stage("tasks: recipe")
            scores = suite.scores(whole.model, tokenizer(checkpoint), micro_batch=micro_batch, on_progress=on_progress)
        yield Evaluated(measured, recipe, notes, scores_reference, scores)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that is gone afterwards. Raises OutputError where files cannot be written meanwhile, or read."""
    try:
        with tempfile.TemporaryDirectory(prefix="qronos-export-") as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"A file could not be written or read: {error}. For temporary ones make room, or let TMPDIR say where."
        ) from error


class _Everything:
    """A plan in which every weight is its own target."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._targets: dict[str, Target] = {}
        self._tensors: dict[str, StoredTensor] = {}

    def claim(self, weights: Mapping[str, Tensor]) -> None:
        for name in self._names & weights.keys():
            rows = torch.arange(len(weights[name]))
            self._targets[name] = Target(name, name, rows, rows)
            self._tensors[name] = StoredTensor(name, "F32", tuple(weights[name].shape), 0, 0)

    def targets(self, name: str) -> list[Target]:
        return [self._targets[name]] if name in self._targets else []

    def forget(self) -> None:
        self._targets.clear()
        self._tensors.clear()

    def tensor(self, target: Target) -> StoredTensor:
        return self._tensors[target.tensor]

    def may_have_scale(self, tensor: str) -> bool:
        return True


class _Nowhere:
    """Blocks are of no use here."""

    def put(
        self, tensor: StoredTensor, fmt: BlockFormat, file_rows: Tensor, blocks: Tensor, values: Tensor, scales: Tensor
    ) -> None:
        pass


class Whole:
    """What a recipe makes of a model, in one piece: a transformers model whose weights become the stored values that
    are put here, and that then computes what the quantized stream does, with what it rounds and rotates on the way.
    """

    def __init__(self, lazy: LazyModel, recipe: Recipe) -> None:
        self.model = load_whole(lazy.checkpoint, lazy.device)
        self._weights: dict[str, Tensor] = {}
        cache = rounded_cache(recipe, lazy) if recipe.kv_cache else None
        width = next(iter(_columns(lazy).values()))
        rounding = (
            None
            if recipe.activations == "none"
            else activation(recipe.activations, find_format(recipe.formats[0], width))
        )
        for name in lazy.block_names:
            block = self.model.get_submodule(name)
            if isinstance(lazy, Online):
                lazy.rotate(block)
                lazy.turn(block)
            self._weights |= calibration.block_matrices(block, name)
            if rounding:
                Block(block, lambda _: True, lambda part, stage: rounding, linear("float32"))
            if cache:
                round_cache(block, cache.keys(), cache.values())

    def put(
        self, tensor: StoredTensor, fmt: BlockFormat, file_rows: Tensor, blocks: Tensor, values: Tensor, scales: Tensor
    ) -> None:
        weight = self._weights[tensor.name]
        weight[file_rows.to(weight.device)] = (values * scales[:, None]).to(weight.dtype)


@dataclass(frozen=True)
class _Output:
    mix: Mix
    store: Store


def _columns(model: LazyModel) -> dict[str, int]:
    """The row length of every weight that will be rounded."""
    columns: dict[str, int] = {}
    for block, block_name in zip(model.blocks, model.block_names, strict=True):
        columns.update((n, w.shape[1]) for n, w in calibration.block_matrices(block, block_name).items())
    return columns


def _check(recipe: Recipe, model: LazyModel) -> None:
    """Raises UsageError for what cannot be done, before anything takes time."""
    if len(recipe.formats) > 1:
        raise UsageError(f"evaluate takes one format at a time, not {recipe.format}.")
    idle = [name for name in ("overrides", "output_type", "embedding_type", "pure") if getattr(recipe, name)]
    if idle:
        raise UsageError(
            f"evaluate gives all linear layers one type and leaves the rest float; {idle[0]} is for files."
        )
    for name in ("compute_dtype", "state_dtype"):
        if (wanted := getattr(recipe, name)) != "float32":
            raise UsageError(f"{name}: evaluate measures, and computes in float32, not in {wanted}; leave it out.")
    if recipe.attention_aware:
        check_attention(model.blocks, model.checkpoint.name)
    if recipe.kv_cache:
        rounded_cache(recipe, model)
    for weight, width in _columns(model).items():
        try:
            fmt = find_format(recipe.formats[0], width)
            fmt.check(width)
        except FormatError as error:
            raise UsageError(f"{weight}: {error}. evaluate takes a single type; mixes are for files.") from error
        if recipe.activations == "llama.cpp" and fmt.ggml_type is None:
            raise UsageError(f"activations: llama.cpp has no kernel for {fmt}, whose inputs it could round; use q8_0.")
        check_activations(recipe.activations, weight, width)


def _everything(model: LazyModel, recipe: Recipe, store: Store) -> tuple[_Everything, _Output]:
    (name,), columns = recipe.formats, _columns(model)
    types = dict.fromkeys(columns, name)
    return _Everything(set(columns)), _Output(Mix(name, 0, types, list(columns), {}), store)


def _of_floats(model: LazyModel, tokens: Tensor, micro_batch: int) -> Evaluation:
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, tokens.split(micro_batch))
    for index in range(len(model.blocks)):
        advance(model.load_block(index), index, batches)
        model.release_block(index)
        give_back()
    losses = torch.cat([
        _losses(_log_probabilities(model, decoder, ids, x), ids)
        for batch in batches
        for ids, x in zip(batch.tokens.split(1), batch.x.split(1), strict=True)
    ])  # fmt: skip
    return Evaluation(*_perplexity(losses), context=tokens.shape[1], chunks=len(tokens))


def _compare(model: LazyModel, riding: Passengers, context: int) -> Evaluation:
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    assert model.head is not None
    head, (stored,) = model.head.weight.data, riding.heads
    reference, losses, divergences, agreed = [], [], [], []
    for batch in riding.batches:
        for ids, x, x_hat in zip(batch.tokens.split(1), batch.x.split(1), batch.x_hat[0].split(1), strict=True):
            p = _log_probabilities(model, decoder, ids, x)
            try:
                model.head.weight.data = stored
                q = _log_probabilities(model, decoder, ids, x_hat)
            finally:
                model.head.weight.data = head
            reference.append(_losses(p, ids))
            losses.append(_losses(q, ids))
            divergences.append((p.exp() * (p - q)).sum(-1).flatten())
            agreed.append((p.argmax(-1) == q.argmax(-1)).flatten())
    divergence = torch.cat(divergences).double()
    return Evaluation(
        *_perplexity(torch.cat(reference)),
        context,
        len(riding.tokens),
        *_perplexity(torch.cat(losses)),
        float(divergence.mean()),
        float(divergence.std() / math.sqrt(len(divergence))),
        100 * float(torch.cat(agreed).float().mean()),
    )


@torch.no_grad()
def _log_probabilities(model: LazyModel, decoder: Decoder, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What is said of the tokens llama.cpp scores, the second half of a chunk: float32 [1, scored, vocabulary]."""
    last = decoder.leave(tokens, hidden)[:, tokens.shape[1] // 2 : -1]
    return F.log_softmax(model.logits(tokens, last), dim=-1)


def _losses(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each scored token: [sequences × scored]."""
    target = tokens[:, tokens.shape[1] // 2 + 1 :]
    return -log_probabilities.gather(-1, target[..., None]).flatten()


def _perplexity(losses: Tensor) -> tuple[float, float]:
    """exp of the mean, and its standard error."""
    losses = losses.double()
    value = math.exp(float(losses.mean()))
    return value, value * float(losses.std()) / math.sqrt(len(losses))
