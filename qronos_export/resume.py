"""What a run has finished, kept so that it can be killed at any moment and go on later, to the same bytes.

A folder in the output holds it while the run is not over:

    manifest.json              what decides the bytes: recipe, contents of model and text, versions, device, threads
    NAME/  NAME.json           a finished piece: float file, calibration tokens, transformed checkpoint
    blocks/FORMAT/*.blocks     finished tensors
    step-00007.json .hashes    after so many steps: layers and tensors since the step before; hashes of their rows
    step-00007.hidden          hidden states of all streams, bit for bit; of the last two steps only
    results.json               sha256 of results that this run put in place
    .qronos-export-run-*       scratch of a run, of no use to another

A step is the embedding, a decoder block or the head. Files are on the disk (fsync) with their checksums in a .json that
then appears there by renaming; a .json has one of itself. Nothing here draws from a generator that outlives a group of
layers: seeds are in the recipe, so there is no state of one to keep.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qronos_export.artifact.block_store import BlockStore
from qronos_export.artifact.gguf import GGUFFile, StoredTensor
from qronos_export.calibration import Clock
from qronos_export.decoder import MicroBatch
from qronos_export.durable import contents, read_raw, read_record, sync, sync_all, whole, write_raw, write_record
from qronos_export.errors import CalibrationError, OutputError, PlanError, TransformError, UsageError
from qronos_export.memory import peak_memory
from qronos_export.plan import Mix, Plan
from qronos_export.report import LayerReport, RunReport, sha256
from qronos_export.workspace import SCRATCH, check_free, existing, lock, scratch, sweep

FOLDER = ".qronos-export-resume"
_MANIFEST = "manifest.json"
_RESULTS = "results.json"
_KEPT = 2  # steps whose hidden states are there
_MENDED_BY_ANOTHER = (UsageError, PlanError, TransformError, CalibrationError)
"""Errors that another recipe or text mends, which what was finished would not fit."""


@contextmanager
def resumable(output: Path, results: list[Path], force: bool, wanted: Mapping[str, str]) -> Iterator[State]:
    """The state of a run of identity `wanted`, new or as a run before left it; gone once all went well.

    Raises OutputError where the state is in use, or another run's (`force` begins anew then), or where results exist
    that are not of this run (`force` replaces them).
    """
    root = output / FOLDER
    sweep(output)
    continued = (root / _MANIFEST).exists()
    if not continued:
        check_free(results, force)
    with existing(output):
        try:
            root.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {output}: {error.strerror}.") from error
        with _alone(root):
            if continued != (root / _MANIFEST).exists():
                with suppress(OSError):
                    root.rmdir()  # where it was made just now
                raise OutputError(f"Another run has begun or ended in {root} just now; start this one again.")
            if continued and (why := _misfit(root, wanted)):
                if not force:
                    raise OutputError(
                        f"{root} cannot be continued: {why}. Run it as it was begun, or begin anew: delete that folder "
                        "or give --force."
                    )
                continued = False
            if continued and not force:
                _check_own(root, results)
            for left in root.iterdir() if not continued else root.glob(f"{SCRATCH}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                with scratch(root, " with --resume") as folder:
                    if not continued:
                        write_record(root / _MANIFEST, dict(wanted))
                    yield State(root, folder)
            except BaseException as error:
                mends = isinstance(error, _MENDED_BY_ANOTHER) and not any(root.glob("step-*.json"))
                if not continued and (mends or len(list(root.glob("*.json"))) < 2):
                    shutil.rmtree(root, ignore_errors=True)
                raise
            sync(output)
            _remove(root)


def discard(output: Path) -> None:
    """Remove the state of a run in `output` unless that is under way: another replaces its results."""
    if not (output / FOLDER).is_dir():
        return
    try:
        handle = lock(output / FOLDER)
    except OSError:
        return
    try:
        _remove(output / FOLDER)
    finally:
        os.close(handle)


def _remove(root: Path) -> None:
    """At once, so that nobody goes on behind half of it; what a kill leaves of it is swept."""
    shutil.rmtree(root.rename(root.with_name(f"{SCRATCH}over")))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process whatever ends that."""
    try:
        handle = lock(root)
    except BlockingIOError as error:
        raise OutputError(f"Another run works in {root}; wait for it, or choose another --output.") from error
    except OSError as error:
        raise OutputError(
            f"{root} cannot be locked ({error.strerror}); choose an --output on another file system, or leave out "
            "--resume."
        ) from error
    try:
        yield
    finally:
        os.close(handle)


def _misfit(root: Path, wanted: Mapping[str, str]) -> str:
    """Why a run of identity `wanted` cannot go on here; empty where it can."""
    known = read_record(root / _MANIFEST)
    if known is None:
        return f"{_MANIFEST} is damaged"
    names = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    return "; ".join(f"{name} was {known.get(name, 'absent')}, is {wanted.get(name, 'absent')}" for name in names)


def _check_own(root: Path, results: list[Path]) -> None:
    """Raises OutputError where one of `results` exists and the run of this state has not put it there."""
    own = read_record(root / _RESULTS) or {}
    for path in results:
        if path.exists() and contents(path) not in own.get(path.name, []):
            raise OutputError(
                f"{path} exists, and the run that {root} continues did not write it. Move it away, or give --force to "
                "replace it."
            )


class Pieces:
    """Files that a run makes on its way, in a `folder` that is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def taken(self, *patterns: str) -> int:
        """Bytes on the disk, by earlier processes, of what `patterns` name here."""
        return 0

    def made(self, name: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """A folder as `make` fills it, and what it returns: plain data."""
        place = self.folder / name
        place.mkdir()
        return place, make(place)

    def store(self, format: str) -> BlockStore:
        return BlockStore(self.folder / "blocks" / format)

    def deliver(self, made: Path, place: Path) -> None:
        """Move a file or folder to where it is a result, instead of what is there."""
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)


class State(Pieces):
    """The same in a folder `root` that outlives the process. `damaged` names what had to be made again."""

    def __init__(self, root: Path, folder: Path) -> None:
        super().__init__(folder)
        self.root = root
        self.damaged: list[str] = []

    def made(self, name: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """As it was made before, where it is whole; steps that rest on another content are dropped."""
        place, path = self.root / name, self.root / f"{name}.json"
        record = read_record(path)
        if record and all(whole(place / file, digest) for file, digest in record["files"].items()):
            return place, record["facts"]
        if path.exists():
            self.damaged.append(name)
        shutil.rmtree(place, ignore_errors=True)
        fresh, facts = super().made(name, make)
        files = {str(file.relative_to(fresh)): sha256(file) for file in sorted(fresh.rglob("*")) if file.is_file()}
        if record is None or record["files"] != files:
            for step in self.root.glob("step-*"):
                step.unlink()
        sync_all(fresh)
        fresh.rename(place)
        write_record(path, {"files": files, "facts": facts})
        return place, facts

    def store(self, format: str) -> BlockStore:
        return BlockStore(self.root / "blocks" / format)

    def deliver(self, made: Path, place: Path) -> None:
        """The same after it is on the disk and known for this run's own."""
        sync_all(made)
        own = read_record(self.root / _RESULTS) or {}
        own.setdefault(place.name, []).append(contents(made))
        write_record(self.root / _RESULTS, own)
        super().deliver(made, place)

    def taken(self, *patterns: str) -> int:
        found = [file for pattern in patterns for top in self.root.glob(pattern) for file in (top, *top.rglob("*"))]
        return sum(file.stat().st_size for file in found if file.is_file())


class Journal:
    """The steps of a run. What was finished before is given to the stores, the plan, the report and the clock.

    done:  steps finished.
    torn:  those of them whose blocks are damaged and have to be made again, though what came of them is there.
    begun: when this run would have, had it done all of them, on perf_counter's clock.
    peak:  largest memory of the processes so far, in bytes.
    """

    def __init__(
        self,
        state: State,
        outputs: Sequence[tuple[Mix, BlockStore]],
        source: GGUFFile,
        plan: Plan,
        result: RunReport,
        clock: Clock,
        begun: float,
    ) -> None:
        self._state, self._outputs, self._source = state, outputs, source
        self._plan, self._result, self._clock = plan, result, clock
        self._saved: set[tuple[str, str]] = set()
        self.begun, self.peak = begun, 0
        self._records, self.torn = self._whole_steps()
        records = self._records
        self.done = len(records)
        for step, record in enumerate(records, start=1):
            if step not in self.torn:
                self._take(step, record)
            result.layers += [LayerReport(**layer) for layer in record["layers"]]
        if records:
            plan.leave(records[-1]["unclaimed"])
            for phase, seconds in records[-1]["clock"].items():
                clock.seconds[phase] += seconds
            self.begun -= records[-1]["seconds"]
            self.peak = records[-1]["peak"]
        for path in state.root.glob("step-*"):
            if int(path.stem.removeprefix("step-")) > self.done:
                path.unlink()

    def restore(self, batches: Sequence[MicroBatch]) -> None:
        """Give `batches`, as they enter the model, the hidden states after the last finished step."""
        with self._path(self.done, "hidden").open("rb") as file:
            for batch in batches:
                batch.x = like = read_raw(file, batch.x)
                for _ in self._outputs:
                    batch.x_hat.append(read_raw(file, like))

    def save(self, batches: Sequence[MicroBatch]) -> None:
        """One more step is finished, and `batches` are where it left them; none where no step needs them."""
        step = self.done + 1
        blocks: dict[str, dict[str, Any]] = {}
        hashes: list[Tensor] = []
        for mix, store in self._outputs:
            blocks[mix.name] = {}
            for name in [name for name in store.formats if (mix.name, name) not in self._saved]:
                path = store.finished(name)
                sync(path)
                blocks[mix.name][name] = {"sha256": sha256(path), "scales": store.scale(name).tolist()}
                hashes.append(store.calibrated(name))
        new = {(format, name) for format, names in blocks.items() for name in names}
        states = (x for batch in batches for x in (batch.x, *batch.x_hat))
        record = {
            "blocks": blocks,
            "hashes": write_raw(self._path(step, "hashes"), hashes),
            "hidden": write_raw(self._path(step, "hidden"), states) if batches else None,
            "layers": [asdict(layer) for layer in self._result.layers if (layer.artifact, layer.tensor) in new],
            "unclaimed": self._plan.unclaimed,
            "clock": self._clock.seconds,
            "seconds": time.perf_counter() - self.begun,
            "peak": max(self.peak, peak_memory()),
        }
        for _, store in self._outputs:
            sync(store.folder)
        write_record(self._path(step, "json"), record)
        self._saved |= new
        self.done = step
        self._path(step - _KEPT, "hidden").unlink(missing_ok=True)

    def mended(self, step: int) -> None:
        """The blocks of a torn step are in the stores again. Raises OutputError where they are others than before."""
        record, hashes = self._records[step - 1], []
        for mix, store in self._outputs:
            for name, known in record["blocks"][mix.name].items():
                path = store.finished(name)
                sync(path)
                if sha256(path) != known["sha256"] or store.scale(name).tolist() != known["scales"]:
                    raise OutputError(
                        f"{name} in {mix.name} was damaged and came out otherwise when it was made again; "
                        f"delete {self._state.root}, or begin anew with --force."
                    )
                hashes.append(store.calibrated(name))
                self._saved.add((mix.name, name))
        write_raw(self._path(step, "hashes"), hashes)

    def values(self, stream: int, tensor: StoredTensor, file_rows: Tensor) -> Tensor:
        """What rows [n] of a finished tensor of an output stand for: float32 [n, columns]."""
        return self._outputs[stream][1].values(tensor, file_rows)

    def _path(self, step: int, kind: str) -> Path:
        return self._state.root / f"step-{step:05}.{kind}"

    def _whole_steps(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Records up to the last step from which a run can go on, and which of these steps lack blocks."""
        records: list[dict[str, Any]] = []
        torn: list[int] = []
        while (path := self._path(len(records) + 1, "json")).exists():
            if (record := read_record(path)) is None:
                self._state.damaged.append(path.stem)
                break
            records.append(record)
            if not self._intact(len(records), record):
                self._state.damaged.append(path.stem)
                torn.append(len(records))
        last = len(records)
        while last and not self._left_states(last, records):
            if (path := self._path(last, "hidden")).exists() and path.stem not in self._state.damaged:
                self._state.damaged.append(path.stem)
            last -= 1
        while last in torn and (last == 1 or self._left_states(last - 1, records)):
            last -= 1  # nothing rests on it, so it is simply done again
        return records[:last], [step for step in torn if step <= last]

    def _left_states(self, step: int, records: list[dict[str, Any]]) -> bool:
        """Whether a run can go on behind a step: its hidden states are there, or not needed."""
        wanted = records[step - 1]["hidden"]
        return wanted is None or whole(self._path(step, "hidden"), wanted)

    def _intact(self, step: int, record: dict[str, Any]) -> bool:
        return whole(self._path(step, "hashes"), record["hashes"]) and all(
            whole(store.path(name), tensor["sha256"])
            for mix, store in self._outputs
            for name, tensor in record["blocks"][mix.name].items()
        )

    def _take(self, step: int, record: dict[str, Any]) -> None:
        with self._path(step, "hashes").open("rb") as file:
            for mix, store in self._outputs:
                for name, known in record["blocks"][mix.name].items():
                    tensor = self._source.tensors[name]
                    fmt = mix.format(name, tensor.columns)
                    assert fmt is not None
                    calibrated = read_raw(file, torch.empty(tensor.rows, dtype=torch.int64))
                    store.take(tensor, fmt, torch.tensor(known["scales"], dtype=torch.float32), calibrated)
                    self._saved.add((mix.name, name))
