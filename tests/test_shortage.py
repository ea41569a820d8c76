"""Memory that runs out, in the words of whoever could not have it, and what is said about it."""

from __future__ import annotations

import errno

import pytest
import torch

from qronos_export.errors import OutOfMemoryError
from qronos_export.memory import ran_out
from qronos_export.recipe import Recipe
from qronos_export.shortage import Where, named


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("unable to mmap 1024 bytes from file </model.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("ncclUnhandledCudaError: Call to CUDA failed.\nLast error:\nCuda failure 'out of memory'"),
        RuntimeError("could not create a memory object"),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_recognized(error: Exception) -> None:
    assert ran_out(error)
    with pytest.raises(OutOfMemoryError, match="in the stage 'layers'"), named(Where(Recipe("m"), stage="layers")):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space"), ValueError("b")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not ran_out(error)
    with pytest.raises(type(error)) as raised, named(Where(Recipe("m"))):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("stage", ["layers", "transforms", "load"])
def test_what_a_resumed_run_may_change_is_said(stage: str) -> None:
    advice = []
    for resume in (False, True):
        with pytest.raises(OutOfMemoryError) as raised, named(Where(Recipe("m"), resume, stage)):
            raise MemoryError
        advice.append(str(raised.value))
    said = "may change --offload, --context and --no-validate; other settings begin anew, with --force."
    assert said not in advice[0]
    assert (said in advice[1]) == (stage != "load")
