"""A GGUF file, whoever wrote it, or one part of a split: what it holds, and whether llama.cpp can make sense of it.

Numbers are read where `formats` knows the type; of the lattice types (IQ1, IQ2, IQ3) and others only the size is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from formats import FORMATS
from qronos_export.inspection.found import ERROR, NOTE, WARNING, Entry, Finding, Inspection, TensorFacts
from qronos_export.inspection.gguf_header import Header, Info, read_header
from qronos_export.inspection.numbers import CHUNK, Statistics, chunks, of_blocks

_TOKENIZER = "tokenizer.ggml."
_TOKENS = f"{_TOKENIZER}tokens"
_TEMPLATE = "tokenizer.chat_template"
_NO_VOCABULARY = ("none", "no_vocab")
_MERGES = ("gpt2", "gemma4")  # tokenizers that llama.cpp does not load without merges
_LONGEST_NAME = 63  # bytes; GGML_MAX_NAME has a zero at its end


def inspect_gguf(path: Path, *, numbers: bool, check: bool) -> Inspection:
    """What `path` holds; with `numbers` each tensor's are read. Where the header breaks off, or `check` is set, there
    are findings. Raises ArtifactError where it is no GGUF that can be read."""
    header = read_header(path)
    layout, readable = _layout(header)
    tensors = []
    for info in header.tensors:
        facts = TensorFacts(info.name, info.type, info.shape, info.weights, info.nbytes)
        if (numbers or check) and id(info) in readable:
            facts = replace(facts, statistics=_statistics(header, info))
        tensors.append(facts)
    findings = list(header.findings)
    if check:
        whole = header.data is not None
        findings += layout
        findings += _tokenizer_findings(header) if whole else []
        findings += about_numbers(tensors)
        findings += _unread(header)
    templates = {
        key: str(entry.value)
        for key, entry in header.metadata.items()
        if key.startswith(_TEMPLATE) and entry.kind == "string"
    }
    metadata = {key: entry for key, entry in header.metadata.items() if key not in templates}
    return Inspection(
        path, f"GGUF v{header.version}", header.size, metadata, _tokenizer(header), templates, tensors, findings
    )


def about_numbers(tensors: list[TensorFacts]) -> Iterator[Finding]:
    """What is wrong with the numbers that were read."""
    for tensor in tensors:
        found = tensor.statistics
        if found is None or tensor.shared:
            continue
        for complaint in found.complaints():
            yield Finding(ERROR, tensor.name, complaint)
        if found.odd_codes:
            yield Finding(WARNING, tensor.name, f"{found.odd_codes} codes are outside of what {tensor.type} writes")
        if found.all_zero and found.weights > 1:
            matrix = found.blocks or sum(size > 1 for size in tensor.shape) > 1
            yield Finding(ERROR if matrix else WARNING, tensor.name, f"all {found.weights} values are zero")


def _layout(header: Header) -> tuple[list[Finding], set[int]]:
    """Where tensors lie: findings, and the identities of those whose bytes are there and their own, so that no byte is
    read twice however often a hostile header names it."""
    findings = []
    names = Counter(info.name for info in header.tensors)
    findings += [Finding(ERROR, name, f"{count} tensors have this name") for name, count in names.items() if count > 1]
    expected: int | None = 0
    readable = set()
    for info in header.tensors:
        wrong = list(_alone(header, info))
        findings += [Finding(ERROR, info.name, what) for what in wrong]
        if expected is not None and info.offset != expected:
            if not wrong:
                what = f"it begins at {info.offset} of the data; llama.cpp wants no gaps, so {expected}"
                findings.append(Finding(ERROR, info.name, what))
            expected = None  # one gap moves all that follow
        if expected is not None:
            expected = None if info.nbytes is None else info.offset + info.nbytes + -info.nbytes % header.alignment
        if header.data is not None and info.nbytes and _end(header, info, info.nbytes) <= header.size:
            readable.add(id(info))
    if header.data is None:
        return findings, set()
    last, before = header.data, ""
    for info in sorted((info for info in header.tensors if id(info) in readable), key=lambda info: info.offset):
        start, end = header.data + info.offset, _end(header, info, info.nbytes or 0)
        if start < last:
            findings.append(Finding(ERROR, info.name, f"its bytes overlap those of {before}"))
            readable.discard(id(info))
        if end > last:
            last, before = end, info.name
    last += -last % header.alignment
    if header.size > last:
        findings.append(Finding(WARNING, "file", f"{header.size - last} bytes follow the last tensor"))
    return findings, readable


def _alone(header: Header, info: Info) -> Iterator[str]:
    """What is wrong with a tensor's entry, all by itself."""
    if info.name_bytes > _LONGEST_NAME:
        yield f"the name has {info.name_bytes} bytes; llama.cpp allows {_LONGEST_NAME}"
    if info.weights == 0:
        yield f"its shape {list(info.shape)} holds nothing"
    if info.weights >= 1 << 63:
        yield f"its shape {list(info.shape)} is beyond all sizes"
    elif info.type.startswith("type "):
        yield f"it has the unknown {info.type}; a newer llama.cpp, or none, may read it"
    elif not info.divides:
        yield f"rows of {info.shape[-1]} weights do not divide into {info.type}'s blocks"
    elif header.data is not None and (over := _end(header, info, info.nbytes or 0) - header.size) > 0:
        yield f"its data ends {over} bytes behind the file's end: the file is truncated or the offset is wrong"
    if info.offset % header.alignment:
        yield f"its offset {info.offset} is not aligned to {header.alignment}"


def _end(header: Header, info: Info, nbytes: int) -> int:
    return (header.data or 0) + info.offset + nbytes


def _statistics(header: Header, info: Info) -> Statistics | None:
    fmt = FORMATS.get(info.type)
    if fmt is None or header.data is None or info.nbytes is None:
        return None
    step = max(1, CHUNK // fmt.block_size) * fmt.block_bytes
    return of_blocks(fmt, chunks(header.path, header.data + info.offset, info.nbytes, step))


def _unread(header: Header) -> Iterator[Finding]:
    counts = Counter(info.type for info in header.tensors if info.nbytes is not None and info.type not in FORMATS)
    for name, count in counts.items():
        said = "1 tensor is known by its" if count == 1 else f"{count} tensors are known by their"
        yield Finding(NOTE, name, f"{said} size only; values were not read")


def _tokenizer(header: Header) -> dict[str, Any]:
    """Model, number of tokens, and special tokens with their texts; empty where the file has no tokenizer."""
    metadata = header.metadata
    found: dict[str, Any] = {
        name: metadata[f"{_TOKENIZER}{name}"].value for name in ("model", "pre") if f"{_TOKENIZER}{name}" in metadata
    }
    tokens = metadata.get(_TOKENS)
    if tokens is not None and tokens.kind == "array of string":
        found["size"] = tokens.count
    ids = _special(metadata)
    if ids and "size" in found:
        texts = header.strings(_TOKENS, set(ids.values()))
        found["special"] = {name: {"id": index, "token": texts.get(index)} for name, index in ids.items()}
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if f"{_TOKENIZER}{name}" in metadata:
            found[name] = metadata[f"{_TOKENIZER}{name}"].value
    return found


def _special(metadata: dict[str, Entry]) -> dict[str, int]:
    """Ids of special tokens: bos, eos, …"""
    ending = "_token_id"
    return {
        key.removeprefix(_TOKENIZER).removesuffix(ending): entry.value
        for key, entry in metadata.items()
        if key.startswith(_TOKENIZER) and key.endswith(ending) and type(entry.value) is int
    }


def _tokenizer_findings(header: Header) -> Iterator[Finding]:
    """Keys that llama.cpp needs to make tokens of text."""
    metadata = header.metadata
    if _number(metadata, "split.no") > 0:
        return  # the first part of a split has all metadata
    purpose = metadata.get("general.type", Entry("string", "model")).value
    if purpose != "model":
        yield Finding(NOTE, "tokenizer", f"not asked for: the file's general.type is {purpose}")
        return
    architecture = metadata.get("general.architecture")
    if architecture is None or architecture.kind != "string":
        yield Finding(
            ERROR, "general.architecture", "the key is missing or no string; llama.cpp does not know the model"
        )
        return
    embedding = next((info for info in header.tensors if info.name == "token_embd.weight"), None)
    if embedding is None and f"{architecture.value}.context_length" not in metadata:
        yield Finding(NOTE, "tokenizer", "not asked for: without token_embd.weight this is no language model")
        return
    model = metadata.get(f"{_TOKENIZER}model")
    if model is None or model.kind != "string":
        yield Finding(ERROR, f"{_TOKENIZER}model", "the key is missing or no string")
        return
    if model.value in _NO_VOCABULARY:
        return
    tokens = metadata.get(_TOKENS)
    if tokens is None or tokens.kind != "array of string" or not tokens.count:
        yield Finding(ERROR, _TOKENS, "the key is missing or no array of strings")
        return
    merges = metadata.get(f"{_TOKENIZER}merges")
    if model.value in _MERGES and (merges is None or merges.kind != "array of string"):
        pre = metadata.get(f"{_TOKENIZER}pre")
        if pre is None or pre.value != "kimi-k2":  # which llama.cpp splits without merges
            yield Finding(
                ERROR, f"{_TOKENIZER}merges", f"the key is missing or no array of strings; {model.value} needs it"
            )
    if model.value == "gpt2" and f"{_TOKENIZER}pre" not in metadata:
        yield Finding(
            WARNING, f"{_TOKENIZER}pre", "the key is missing; llama.cpp splits text by a default that may be wrong"
        )
    for name in ("scores", "token_type"):
        yield from _beside_tokens(metadata, name, tokens.count, needed=name == "token_type" or model.value == "llama")
    ids = _special(metadata)
    if "eos" not in ids:
        yield Finding(WARNING, f"{_TOKENIZER}eos_token_id", "the key is missing; generation may not end")
    for name, index in ids.items():
        if not 0 <= index < tokens.count:
            yield Finding(ERROR, f"{_TOKENIZER}{name}_token_id", f"{index} is none of the {tokens.count} tokens")
    if embedding is not None and len(embedding.shape) > 1 and embedding.shape[-2] != tokens.count:
        what = f"{tokens.count} tokens, and token_embd.weight has {embedding.shape[-2]} rows; llama.cpp refuses that"
        yield Finding(ERROR, _TOKENS, what)


def _beside_tokens(metadata: dict[str, Entry], name: str, count: int, *, needed: bool) -> Iterator[Finding]:
    key = f"{_TOKENIZER}{name}"
    entry = metadata.get(key)
    if entry is None:
        if needed:
            yield Finding(WARNING, key, "the key is missing; llama.cpp takes all tokens alike")
    elif entry.kind not in ("array of float32", "array of int32", "array of uint32") or (entry.count or 0) < count:
        yield Finding(ERROR, key, f"it is {entry.kind} with {entry.count or 0} entries for {count} tokens")


def _number(metadata: dict[str, Entry], key: str) -> int:
    entry = metadata.get(key)
    return entry.value if entry is not None and isinstance(entry.value, int) else 0
