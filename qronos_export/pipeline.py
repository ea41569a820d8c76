"""The whole run, read top to bottom: checkpoint → two streams → rounding → blocks → GGUF → llama.cpp → report.

`run` is a generator of events and prints nothing; the command line, a notebook or a test draws them as it likes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qronos_export import corpus, report
from qronos_export.activations import check_activations
from qronos_export.artifact.gguf import GGUFFile
from qronos_export.artifact.gguf_rows import RowIndex
from qronos_export.artifact.gguf_verify import verify_gguf
from qronos_export.artifact.gguf_write import restate, write_gguf
from qronos_export.attention import check_attention
from qronos_export.calibration import Clock
from qronos_export.checkpoint import Checkpoint, LazyModel, open_checkpoint
from qronos_export.choice import choose_types
from qronos_export.durable import read_raw, write_raw
from qronos_export.events import Event, Finished, Resumed, Stage, Step
from qronos_export.folding import fold
from qronos_export.followers import Work
from qronos_export.identity import identity
from qronos_export.llamacpp import LlamaCpp
from qronos_export.memory import give_back, peak_memory
from qronos_export.onnx_export import float_graph, onnx_folder, onnx_versions, write_onnx
from qronos_export.onnx_validation import TorchReference, open_session
from qronos_export.output import Output
from qronos_export.plan import Plan
from qronos_export.preconditions import check_ranks, check_recipe
from qronos_export.proof import Held, float_file, held_out_file, reference
from qronos_export.provenance import dataset_of, file_facts, model_facts, validation_facts
from qronos_export.ranks import ALONE, Ranks
from qronos_export.recipe import Recipe
from qronos_export.report import Artifact, RunReport
from qronos_export.residual import NO_WRITERS
from qronos_export.resolved import matched, replayable
from qronos_export.resume import Journal, Pieces, State, discard, resumable
from qronos_export.shortage import Where, named
from qronos_export.streams import calibrate, mend, round_to_nearest, rounded_cache
from qronos_export.transformed import PROBE, need_inputs
from qronos_export.validation import Cache
from qronos_export.workspace import check_space, float_bytes, folded_bytes, stored_bytes, workspace


def run(
    recipe: Recipe,
    output: Path,
    *,
    llamacpp: LlamaCpp,
    held: Held | None,
    force: bool = False,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Event, None, None]:
    """Quantize by `recipe` into `output`/<model>-<format>.gguf and report.json; `held` None skips validation.

    `on_progress(done, total)` is called within stages that are one call: sampling text, llama.cpp's runs. Of several
    `ranks` this is the first; the others `followers.follow`.

    Raises QronosError; then, and when interrupted, nothing partial is left in `output`. With `resume` what is finished
    stays there in a hidden folder, however the run ends before it is over, and the next one goes on behind it.
    """
    where = Where(recipe, resume)
    with named(where), closing(_run(recipe, output, llamacpp, held, force, resume, on_progress, ranks)) as events:
        for event in events:
            where.stage = event.name if isinstance(event, Stage) else where.stage
            yield event


def _run(
    recipe: Recipe,
    output: Path,
    llamacpp: LlamaCpp,
    held: Held | None,
    force: bool,
    resume: bool,
    on_progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> Generator[Event, None, None]:
    begun = time.perf_counter()
    yield Stage("load")
    check_recipe(recipe, held, llamacpp)
    check_ranks(recipe, ranks, resume)
    device = ranks.device(recipe.device)
    layouts = [each for each in recipe.artifacts if each != "gguf"]
    versions = report.versions(llamacpp.version) | (onnx_versions() if layouts else {})
    checkpoint = open_checkpoint(recipe.model)
    recipe = matched(recipe, checkpoint)
    report_path = output / "report.json"
    paths = {name: output / f"{checkpoint.name}-{name}.gguf" for name in recipe.formats}
    results = [path for path in paths.values() if "gguf" in recipe.artifacts]
    results += [onnx_folder(path, layout) for path in paths.values() for layout in layouts]
    if resume:
        yield Stage("checksums")
    with _pieces(output, [*results, report_path], force, resume, recipe, checkpoint, device, versions) as pieces:
        folder = pieces.folder
        needed = 0 if checkpoint.float_gguf else stored_bytes(checkpoint)
        if recipe.transform_names:  # their checkpoints, and the last one's file
            needed += folded_bytes(recipe, checkpoint) + float_bytes(checkpoint)
        needed += 2 * float_bytes(checkpoint) if layouts else 0  # the builder's graph, its embedding twice if tied
        check_space(folder, needed - pieces.taken("float*", "transforms"))
        text = held_out_file(held, folder) if held else None
        if held and text:
            corpus.check_length(text, checkpoint, 2 * held.context)
        clock = Clock()
        result = RunReport(
            model={},  # known with the float file
            recipe=replayable(recipe, checkpoint, device).to_json(),
            versions=versions,
            device=str(device),
        )
        if recipe.kv_cache:
            rounded_cache(recipe, LazyModel(checkpoint, device))
        graph = None
        if layouts:
            yield Stage("onnx graph")
            graph = float_graph(checkpoint, folder / "graph")  # refuses models it does not know
            clock.lap("load")
        original, tokens = checkpoint, None
        reference_file = _float_file("float", original, llamacpp, pieces)
        source = GGUFFile(reference_file)
        result.model, result.notes = model_facts(checkpoint, source)
        mixes = [choose_types(source, name, recipe, llamacpp) for name in paths]  # refuses before anything takes time
        for tensor in dict.fromkeys(tensor for each in mixes for tensor in each.quantized):
            check_activations(recipe.activations, tensor, source.tensors[tensor].columns)
        if recipe.attention_aware:
            check_attention(LazyModel(checkpoint).blocks, checkpoint.name)
        names = recipe.transform_names
        if names:
            clock.lap("load")
            if recipe.method != "rtn" or need_inputs(names):
                yield Stage("calibration text")
                tokens = _draw(recipe, original, device, result, clock, pieces, on_progress)
            yield Stage("transforms")
            checkpoint, names, notes = _fold(
                recipe, original, PROBE.to(device) if tokens is None else tokens, pieces, on_progress, ranks
            )
            result.notes += notes
            if names:
                source = GGUFFile(_float_file("float-transformed", checkpoint, llamacpp, pieces))
                mixes = [choose_types(source, name, recipe, llamacpp) for name in paths]
                if graph:
                    shutil.rmtree(folder / "graph")
                    graph = float_graph(checkpoint, folder / "graph")
            clock.lap("transforms")
        result.recipe["transforms"] = ",".join(names) or "none"
        outputs = [
            Output(each, pieces.store(name), path) for each, (name, path) in zip(mixes, paths.items(), strict=True)
        ]
        needed = 2 * sum(each.bytes(source) for each in outputs) - pieces.taken("blocks", "step-*")
        check_space(folder, needed)
        wanted = dict.fromkeys(name for each in outputs for name in each.mix.quantized)
        plan = Plan(source, RowIndex(source, list(wanted)))
        model = LazyModel(checkpoint, device)
        clock.lap("load")
        if tokens is None and recipe.method != "rtn":
            yield Stage("calibration text")
            tokens = _draw(recipe, original, device, result, clock, pieces, on_progress)
        if tokens is not None:  # a journal has hidden states after the last two steps, and those that are being written
            numbers = tokens.numel() * model.embedding.embedding_dim * (1 + len(outputs))
            offloaded = getattr(torch, recipe.state_dtype).itemsize if recipe.offload == "disk" else 0
            journaled = 3 * torch.float32.itemsize if isinstance(pieces, State) else 0
            check_space(folder, needed + (offloaded + journaled) * numbers)
        journal = None
        if isinstance(pieces, State):
            journal = Journal(pieces, [(each.mix, each.store) for each in outputs], source, plan, result, clock, begun)
            begun = journal.begun
            if journal.done or pieces.damaged:
                yield Resumed(journal.done, pieces.damaged)
            if journal.torn:
                yield Stage("layers")
                apart = Plan(source, RowIndex(source, list(wanted)))  # the run's goes on behind the torn steps
                mend(model, apart, outputs, tokens, recipe, journal, folder)
                del apart
        if tokens is None:
            rounded = round_to_nearest(model, plan, outputs, clock, journal)
        else:
            ranks.send(Work(recipe, checkpoint, source.path, mixes, tokens.cpu(), folder))
            rounded = calibrate(
                model, plan, outputs, tokens, recipe, clock, journal=journal, ranks=ranks, folder=folder
            )

        yield Stage("layers", sum(len(each.mix.quantized) for each in outputs))
        finished = {(layer.artifact, layer.tensor) for layer in result.layers}
        yield Step(len(finished))
        for layer in rounded:
            result.layers.append(layer)
            finished.add((layer.artifact, layer.tensor))
            yield Step(len(finished), layer)
        if recipe.residual_aware and not any(layer.residual for layer in result.layers):
            result.notes.append(NO_WRITERS)
        for each in outputs:
            result.kept += each.kept(source, plan)
            result.substitutes += each.substitutes()
        earlier_peak = journal.peak if journal else 0
        del model, plan, rounded, tokens, journal  # what follows needs none of their memory
        give_back()

        yield Stage("write", len(outputs))
        clock.lap(None)
        for done, each in enumerate(outputs, start=1):
            if "gguf" in recipe.artifacts:
                file = folder / each.path.name
                facts = file_facts(source, result.recipe, each.mix.name, result.model, result.calibration)
                write_gguf(source, each.store, each.mix.file_type, file, facts)
                bits = verify_gguf(file, source, each.store).bits_per_weight
                result.artifacts.append(
                    Artifact(file.name, each.mix.name, file.stat().st_size, bits, report.sha256(file))
                )
            for layout in layouts:
                assert graph is not None
                folder_name = onnx_folder(each.path, layout).name
                written, notes = write_onnx(
                    graph, source, each.store, folder / folder_name, format=each.mix.name, layout=layout,
                    level=recipe.accuracy_level,
                )  # fmt: skip
                result.artifacts.append(written)
                result.notes += [note for note in notes if note not in result.notes]
            if not resume:
                each.store.discard()
            yield Step(done)
        for path in results:
            pieces.deliver(folder / path.name, path)
        clock.lap("write")
        result.seconds = {**clock.seconds, "total": time.perf_counter() - begun}
        result.peak_memory_bytes = max(peak_memory(), earlier_peak)
        _report(result, report_path, pieces)

        if held and text and "gguf" in recipe.artifacts:
            yield Stage("validate: float model")
            with reference(
                reference_file, text, held, llamacpp, folder, Cache(**{**recipe.kv_cache, **held.cache}), on_progress
            ) as against:
                for artifact in result.artifacts:
                    if not artifact.path.endswith(".gguf"):
                        continue
                    yield Stage(f"validate: {artifact.format}")
                    artifact.validation = against.compare(output / artifact.path, on_chunk=on_progress).to_json()
                    _report(result, report_path, pieces)
                    _state(artifact, output / artifact.path, pieces)
                    clock.lap("validate")
                    result.seconds = {**clock.seconds, "total": time.perf_counter() - begun}
                    _report(result, report_path, pieces)
        # onnx-mx has types that onnxruntime lacks.
        runnable = [each for each in result.artifacts if not each.path.endswith((".gguf", "-onnx-mx"))]
        if held and text and runnable:
            yield Stage("validate: float model in torch")
            measured = TorchReference(
                original, text, device=device, context=held.context, chunks=held.chunks,
                micro_batch=recipe.micro_batch, on_chunk=on_progress,
            )  # fmt: skip
            for artifact in runnable:
                yield Stage(f"validate: {artifact.path}")
                session = open_session(output / artifact.path)
                artifact.validation = measured.compare(session, on_chunk=on_progress).to_json()
                clock.lap("validate")
                result.seconds = {**clock.seconds, "total": time.perf_counter() - begun}
                _report(result, report_path, pieces)
    yield Finished(result, output)


def _report(result: RunReport, path: Path, pieces: Pieces) -> None:
    written = pieces.folder / path.name
    result.write(written)
    pieces.deliver(written, path)


def _state(artifact: Artifact, file: Path, pieces: Pieces) -> None:
    """Put its validation into the metadata of `file`."""
    assert artifact.validation is not None
    check_space(pieces.folder, file.stat().st_size)
    stated = pieces.folder / file.name
    restate(GGUFFile(file), validation_facts(artifact.validation), stated)
    artifact.bytes, artifact.sha256 = stated.stat().st_size, report.sha256(stated)
    pieces.deliver(stated, file)


@contextmanager
def _pieces(
    output: Path,
    results: list[Path],
    force: bool,
    resume: bool,
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    versions: dict[str, str],
) -> Iterator[Pieces]:
    """Where the run makes what it needs on its way: for itself, or so that it can be resumed."""
    if resume:
        with resumable(output, results, force, identity(recipe, checkpoint, device, versions)) as state:
            yield state
    else:
        if force:
            discard(output)
        with workspace(output, results, force) as folder:
            yield Pieces(folder)


def _float_file(name: str, checkpoint: Checkpoint, llamacpp: LlamaCpp, pieces: Pieces) -> Path:
    """The float GGUF of a checkpoint, the piece `name` unless the user gave it."""
    if checkpoint.float_gguf is not None:
        return checkpoint.float_gguf
    place, facts = pieces.made(name, lambda folder: {"file": float_file(checkpoint, llamacpp, folder).name})
    return place / str(facts["file"])


def _fold(
    recipe: Recipe,
    original: Checkpoint,
    tokens: torch.Tensor,
    pieces: Pieces,
    on_progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> tuple[Checkpoint, list[str], list[str]]:
    """`fold` as a piece of the run: the checkpoint, the transforms that fit it, notes."""

    def make(folder: Path) -> dict[str, Any]:
        folded = fold(recipe, original, tokens, folder, on_progress=on_progress, ranks=ranks)
        where = str(folded.checkpoint.folder.relative_to(folder)) if folded.transforms else None
        return {"folder": where, "transforms": folded.transforms, "notes": folded.notes}

    place, facts = pieces.made("transforms", make)
    if facts["folder"] is None:
        return original, facts["transforms"], facts["notes"]
    checkpoint = replace(open_checkpoint(str(place / facts["folder"])), name=original.name, source=original.source)
    return checkpoint, facts["transforms"], facts["notes"]


def _draw(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    result: RunReport,
    clock: Clock,
    pieces: Pieces,
    on_progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """The calibration tokens on `device`: int64 [samples, sequence_length]; `result` says where they came from."""

    def make(folder: Path) -> dict[str, Any]:
        drawn = corpus.calibration_tokens(
            recipe.calibration,
            checkpoint,
            samples=recipe.samples,
            length=recipe.sequence_length,
            seed=recipe.seed,
            device=device,
            on_progress=on_progress,
        )
        write_raw(folder / "tokens", [drawn.tokens])
        return {
            "text": drawn.description,
            "tokens": drawn.tokens.numel(),
            "sha256": drawn.sha256,
            "dataset": dataset_of(recipe.calibration),
        }

    place, result.calibration = pieces.made("tokens", make)
    clock.lap("calibration")
    with (place / "tokens").open("rb") as file:
        return read_raw(file, torch.empty(recipe.samples, recipe.sequence_length, dtype=torch.int64, device=device))
