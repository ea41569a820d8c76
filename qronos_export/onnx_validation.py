"""How good an ONNX model is: perplexity and KL divergence against the float model in torch, by llama-perplexity's
protocol, so that the numbers are those of `validation` but for the runtime.

The float model runs once, block by block; what its last block returned is kept, and logits are made again for each
file that is compared.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qronos_export.artifact.onnx_builder import check_packages
from qronos_export.checkpoint import Checkpoint, LazyModel
from qronos_export.corpus import Progress, held_out_tokens
from qronos_export.decoder import Decoder, MicroBatch, advance, enter
from qronos_export.errors import ArtifactError
from qronos_export.memory import give_back
from qronos_export.paired import Chunks
from qronos_export.validation import Validation

if TYPE_CHECKING:
    from qronos_export.artifact.onnx_session import Session

_PROBED = 64  # tokens on which a graph is compared with torch
_SAME = 1e-3  # largest difference of logits that is arithmetic, as a share of the largest logit; 1e-6 is usual


def open_session(file: Path) -> Session:
    """`file`, a .onnx or a folder with one, in onnxruntime. Raises UsageError or ArtifactError where that cannot be."""
    check_packages()  # without which not even what follows can be imported
    from qronos_export.artifact.onnx_session import Session, find_model

    return Session(find_model(file))


class TorchReference:
    """The float model `checkpoint` run on `text` in chunks of `context` tokens, at most `chunks`.

    Raises CalibrationError for a text shorter than two chunks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Path,
        *,
        device: torch.device,
        context: int,
        chunks: int | None,
        micro_batch: int = 8,
        on_chunk: Progress | None = None,
    ) -> None:
        tokens = held_out_tokens(text, checkpoint, context, chunks).to(device)
        self._text_sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
        self._model = LazyModel(checkpoint, device)
        self._decoder, self._batches = _through(self._model, tokens, micro_batch, on_chunk)
        self._context, self._chunks = context, len(tokens)

    @property
    def weights(self) -> int:
        """Of the float model, those shared counted once."""
        return sum(each.numel() for each in self._model.model.parameters())

    @torch.no_grad()
    def compare(self, session: Session, *, on_chunk: Progress | None = None) -> Validation:
        """Raises ArtifactError where the session's model has another vocabulary."""
        half = self._context // 2
        scores = []
        for batch in self._batches:
            for ids, x in zip(batch.tokens.split(1), batch.x.split(1), strict=True):
                read = self._decoder.leave(ids, x)[:, half:-1]
                p = F.log_softmax(self._model.logits(ids, read), dim=-1)[0].cpu()
                found = session.logits(ids)[0, half:-1]
                if found.shape != p.shape:
                    raise ArtifactError(
                        f"{session.path} has {found.shape[1]} tokens and the reference {p.shape[1]}: two models."
                    )
                q = F.log_softmax(found, dim=-1)
                scores.append(_scores(p, q, ids[0, half + 1 :].cpu()))
                if on_chunk:
                    on_chunk(len(scores), self._chunks)
        loss_p, loss_q, divergence, agreed, change = torch.cat(scores, dim=1).double()
        _, losses, divergences, agreements, _ = torch.stack(scores).double().mean(2).T.tolist()
        count = len(agreed)
        same = float(agreed.mean())
        return Validation(
            *_perplexity(loss_q),
            *_perplexity(loss_p),
            kl_divergence=float(divergence.mean()),
            kl_divergence_error=float(divergence.std()) / math.sqrt(count),
            kl_median=float(divergence.median()),
            kl_99=float(divergence.quantile(0.99)),
            kl_max=float(divergence.max()),
            same_top=100 * same,
            same_top_error=100 * math.sqrt(same * (1 - same) / (count - 1)),
            rms_delta_p=100 * float(change.square().mean().sqrt()),
            context=self._context,
            chunks=self._chunks,
            text_sha256=self._text_sha256,
            llama_cpp=None,
            onnxruntime=session.version,
            cache_k="f32",
            cache_v="f32",
            per_chunk=Chunks(losses, divergences, [100 * share for share in agreements]),
        )


@torch.no_grad()
def check_graph(graph: Path, checkpoint: Checkpoint) -> None:
    """Raises ArtifactError unless onnxruntime makes the same logits with the float model `graph` as torch."""
    tokens = torch.arange(5, 5 + _PROBED)[None]
    model = LazyModel(checkpoint, torch.device("cpu"))
    decoder, (batch,) = _through(model, tokens, 1)
    expected = model.logits(tokens, decoder.leave(tokens, batch.x))
    off = float((open_session(graph).logits(tokens) - expected).abs().max() / expected.abs().max())
    if not off < _SAME:
        raise ArtifactError(
            f"onnxruntime-genai's model builder makes another model of {checkpoint.name}: its logits are off by "
            f"{off:.1e} of the largest. It does not know some setting in config.json, perhaps of the positions "
            "(rope_scaling). Use --artifact gguf, or a newer onnxruntime-genai."
        )


def _through(
    model: LazyModel, tokens: Tensor, micro_batch: int, on_block: Progress | None = None
) -> tuple[Decoder, list[MicroBatch]]:
    """The decoder, and `tokens` after its last block."""
    decoder = Decoder(model.model.get_decoder(), model.blocks)
    batches = enter(decoder, tokens.split(micro_batch))
    count = len(model.blocks)
    for index in range(count):
        advance(model.load_block(index), index, batches)
        model.release_block(index)
        give_back()
        if on_block:
            on_block(index + 1, count)
    return decoder, batches


def _scores(p: Tensor, q: Tensor, target: Tensor) -> Tensor:
    """Of log-probabilities `p` and `q` [scored, vocabulary]: both losses, divergence, whether the top is the same, and
    the change of the right token's probability: [5, scored]."""
    loss_p, loss_q = (-each.gather(1, target[:, None])[:, 0] for each in (p, q))
    divergence = (p.exp() * (p - q)).sum(1)
    same = (p.argmax(1) == q.argmax(1)).float()
    return torch.stack([loss_p, loss_q, divergence, same, (-loss_q).exp() - (-loss_p).exp()])


def _perplexity(losses: Tensor) -> tuple[float, float]:
    """exp of the mean, and its standard error."""
    value = math.exp(float(losses.mean()))
    return value, value * float(losses.std()) / math.sqrt(len(losses))
