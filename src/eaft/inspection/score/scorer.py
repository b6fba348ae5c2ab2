"""Tokens scored by a model, a shard of examples at a time, and written as the folder has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch import Tensor
from trl import ModelConfig, get_quantization_config

from eaft.errors import ConfigurationError, NonFiniteError, first_line
from eaft.evaluation.scores import generation_config
from eaft.inspection.folder import COMPARED, EXAMPLES, STATISTICS, TOKENS
from eaft.inspection.score.examples import Examples, Tokens, batches, count_labelled
from eaft.inspection.score.pieces import Pieces
from eaft.models import adapter_of, check_finite, loading, resolve_model
from eaft.objective.gate_spec import bind_gate
from eaft.objective.statistics import TokenStatistics
from eaft.training.config import EAFTConfig
from eaft.training.head import GatedLMHead
from eaft.training.logits_check import check_logits
from eaft.training.train import model_init_kwargs
from eaft.training.trl_internals import create_model_from_path

BATCH_TOKENS, GPU_BATCH_TOKENS = 2**12, 2**14  # of a batch, padding included
# Of the logits that the top-K curve is drawn from: tokens, examples they are from, and elements of
# all of them
SAMPLE_TOKENS, SAMPLE_EXAMPLES, SAMPLE_LOGITS = 2048, 64, 10**8
FLOATS = [field.name for field in STATISTICS if pa.types.is_floating(field.type)]
Advance = Callable[[int], Any]
# A token takes 14 bytes on disk where answers are labelled, 18 of text (GSM8K): floats of a column
# have their upper bytes in common, and numbers count up
DICTIONARY = ("token_id", "first_choice", "rank", "origin", "source")
ENCODINGS = dict.fromkeys(FLOATS, "BYTE_STREAM_SPLIT")
ENCODINGS |= dict.fromkeys(("example", "position", "end"), "DELTA_BINARY_PACKED")


@dataclass(frozen=True)
class Settings:
    """The flags that say how models compute."""

    args: EAFTConfig
    model_args: ModelConfig

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that training computes in, beside that of the weights."""
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None


class Scorer:
    """
    A model, loaded as `eaft train` loads it, that scores examples as training sees them at step 0.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter.
        settings: how it computes.
        is_base: `model_revision` is of this model.

    Raises:
        ConfigurationError: it cannot be loaded, or its logits are not what we think.
    """

    def __init__(self, model: str, settings: Settings, is_base: bool = True) -> None:
        self.name, self.settings = model, settings
        self.device = settings.args.device
        self.model = load(model, settings, is_base).eval()
        self.base_model = (
            self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        )
        self.head = GatedLMHead(self.base_model, bind_gate("sft", top_k=settings.args.gate_top_k))
        self.vocab_size = self.base_model.get_input_embeddings().weight.shape[0]
        self.checked = False

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradient, in training's dtype."""
        dtype = self.settings.autocast
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            yield

    def statistics(self, tokens: Tokens, batch: list[int]) -> tuple[TokenStatistics, np.ndarray]:
        """
        Return the statistics of the labelled tokens of some examples, and where in `tokens` each of
        them is.
        """
        width = int(tokens.lengths[batch].max())
        # Padding is on the right, where causal attention does not look
        ids, labels = np.zeros((len(batch), width), np.int64), np.full((len(batch), width), -100)
        places = []
        for row, i in enumerate(batch):
            part = slice(tokens.starts[i], tokens.starts[i] + tokens.lengths[i])
            ids[row, : tokens.lengths[i]] = tokens.ids[part]
            labels[row, : tokens.lengths[i]] = np.where(
                tokens.labelled[part], tokens.ids[part], -100
            )
            places.append(np.flatnonzero(tokens.labelled[part]) + part.start)
        if ids.max() >= self.vocab_size:
            raise ConfigurationError(
                f"{self.name} has {self.vocab_size} tokens, and the data, as it is tokenized, one"
                f" of id {ids.max()}."
            )
        inputs = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "labels": torch.from_numpy(labels),
        }
        inputs["labels"] = inputs["labels"].to(self.device)
        with self.computing():
            if not self.checked:
                shortest = {
                    name: tensor[-1:, : tokens.lengths[batch[-1]]]
                    for name, tensor in inputs.items()
                }
                check_logits(self.model, shortest, lambda found: found)
                self.checked = True
            return self.head.statistics(self.base_model, **inputs), np.concatenate(places)

    def logits(self, ids: list[int], positions: np.ndarray) -> Tensor:
        """
        Return the logits `[n, V]` (float32, on the CPU) that predict the tokens at some positions
        of an example.
        """
        chosen = torch.zeros(1, len(ids), dtype=torch.bool)
        chosen[0, positions - 1] = True
        with self.computing():
            return self.head.logits(
                self.base_model, chosen, input_ids=torch.tensor([ids], device=self.device)
            ).cpu()


def load(model: str, settings: Settings, is_base: bool) -> Any:
    """Return a model on its device, an adapter around its base."""
    args, adapter = settings.args, adapter_of(model)
    options = model_init_kwargs(args, settings.model_args)
    options["quantization_config"] = get_quantization_config(settings.model_args)
    if PartialState().num_processes > 1:
        options["device_map"] = None  # each process has its own device
    if not is_base:
        options["revision"] = None
    name = model
    if adapter is not None:
        name = resolve_model(adapter["base_model_name_or_path"], args.trust_remote_code)
        options["revision"] = adapter.get("revision")
    options = {
        key: value for key, value in options.items() if value is not None or key == "device_map"
    }
    try:
        with loading(f"{model} cannot be loaded."):
            loaded = create_model_from_path(name, **options)
            if adapter is not None:
                loaded = with_adapter(loaded, model)
                loaded.get_base_model().generation_config = generation_config(model)
    except (ValueError, RuntimeError) as error:  # TRL's, of its arguments; PEFT's
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{model} cannot be loaded. ({first_line(error)})") from error
    check_finite(loaded, model)
    placed = hasattr(loaded, "hf_device_map") or options.get("quantization_config") is not None
    return loaded if placed else loaded.to(args.device)


def with_adapter(base: Any, folder: str) -> Any:
    """
    Return a model with the PEFT adapter of a folder.

    Raises:
        ConfigurationError: an adapter that is no change of weights.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = PeftModel.from_pretrained(base, folder)
    if model.active_peft_config.is_prompt_learning:
        raise ConfigurationError(
            f"{folder} adds tokens to the prompt instead of changing weights: not inspected."
        )
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):  # the head is multiplied by its weight alone
        layer = head.get_base_layer()
        layer.weight = torch.nn.Parameter(
            layer.weight.detach().clone()
        )  # which may be the embedding's too
        head.merge()
    return model


def score_shard(
    scorer: Scorer, examples: Examples, part: range, advance: Advance
) -> tuple[Tokens, dict[str, np.ndarray]]:
    """
    Return a shard's tokens and the columns of `STATISTICS`, of which those of unlabelled tokens
    mean nothing.

    Args:
        advance: told of each batch's tokens.

    Raises:
        NonFiniteError: the model's probabilities are NaN or infinite; names the rows.
    """
    tokens = examples.tokens(part)
    floats = {name: np.zeros(len(tokens.ids), np.float32) for name in FLOATS}
    found: dict[str, np.ndarray] = {
        f.name: floats.get(f.name, np.zeros(len(tokens.ids), np.int32)) for f in STATISTICS
    }
    for batch in batches(
        tokens, GPU_BATCH_TOKENS if scorer.device.type == "cuda" else BATCH_TOKENS
    ):
        statistics, places = scorer.statistics(tokens, batch)
        values = {name: getattr(statistics, name).cpu().numpy() for name in found}
        finite = np.isfinite(np.stack([values[name] for name in FLOATS])).all(0)
        if not finite.all():
            ends = tokens.starts + tokens.lengths
            bad = sorted(
                {
                    examples.row(part[i])
                    for i in np.searchsorted(ends, places[~finite], side="right")
                }
            )
            raise NonFiniteError(
                f"{scorer.name}: probabilities are not finite in {examples.origin(part)}, row"
                f" {', '.join(map(str, bad[:10]))}. Look at these rows, or compute in float32"
                " (--bf16 false)."
            )
        for name, column in values.items():
            found[name][places] = column
        advance(int(tokens.lengths[batch].sum()))
    return tokens, found


def token_table(
    part: range, tokens: Tokens, found: dict[str, np.ndarray], pieces: Pieces
) -> tuple[pa.Table, list[str]]:
    """Return a shard as a table of `TOKENS`, and the text of each example."""
    texts, ends = [], []
    for start, length in zip(tokens.starts, tokens.lengths, strict=True):
        text, its_ends = pieces.join(tokens.ids[start : start + length].tolist())
        texts.append(text)
        ends += its_ends
    columns = {
        **keys(part, tokens),
        "token_id": tokens.ids,
        "end": ends,
        "labelled": tokens.labelled,
    }
    return table({**columns, **nulled(tokens, found)}, TOKENS), texts


def compared_table(part: range, tokens: Tokens, found: dict[str, np.ndarray]) -> pa.Table:
    """Return a shard as a table of `COMPARED`."""
    return table({**keys(part, tokens), **nulled(tokens, found)}, COMPARED)


def keys(part: range, tokens: Tokens) -> dict[str, np.ndarray]:
    """Return the columns that say which token a row is."""
    position = np.arange(len(tokens.ids)) - np.repeat(tokens.starts, tokens.lengths)
    return {"example": np.repeat(np.array(part), tokens.lengths), "position": position}


def nulled(tokens: Tokens, found: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    """Return the statistics' columns, null where nothing is labelled."""
    return {name: pa.array(values, mask=~tokens.labelled) for name, values in found.items()}


def table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Return columns in the order and the types of a schema."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    return pa.table({field.name: arrays[field.name].cast(field.type) for field in schema}, schema)


def example_table(
    about: dict[str, list[Any]],
    tokens: Tokens,
    found: dict[str, np.ndarray],
    texts: list[str],
    top_k: int,
) -> pa.Table:
    """Return a shard's examples as a table of `EXAMPLES`."""
    column = {name: torch.from_numpy(values) for name, values in found.items()}
    statistics = TokenStatistics(
        **{name: column[name] for name in ("log_prob", "entropy", "top_k_entropy", "sum_sq_probs")},
        is_top1=column["rank"] == 1,
        top_k=top_k,
    )
    nll, conflict = statistics.nll.double().numpy(), statistics.is_conflict.numpy()
    labelled = count_labelled(tokens)

    def sums(values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.where(tokens.labelled, values, 0.0).cumsum()])
        return total[tokens.starts + tokens.lengths] - total[tokens.starts]

    def share(part: np.ndarray, whole: np.ndarray) -> pa.Array:
        return pa.array(part / np.where(whole > 0, whole, 1), mask=~(whole > 0))

    nll_sum = sums(nll)
    columns = {
        **about,
        "text": texts,
        "tokens": tokens.lengths,
        "labelled": labelled,
        "nll": share(nll_sum, labelled),
        "entropy": share(sums(statistics.entropy.double().numpy()), labelled),
        "conflict_share": share(sums(conflict.astype(float)), labelled),
        "conflict_nll_share": share(sums(nll * conflict), np.where(labelled > 0, nll_sum, 0)),
    }
    return table(columns, EXAMPLES)


def write_parquet(tables: pa.Table | Iterator[pa.Table], schema: pa.Schema, file: Path) -> None:
    """Write a table, or several after one another, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_suffix(".tmp")
    with pq.ParquetWriter(
        staging,
        schema,
        compression="zstd",
        use_dictionary=[name for name in DICTIONARY if name in schema.names],
        column_encoding={
            name: encoding for name, encoding in ENCODINGS.items() if name in schema.names
        },
    ) as writer:
        for one in [tables] if isinstance(tables, pa.Table) else tables:
            writer.write_table(one)
    os.replace(staging, file)


def sample_logits(scorer: Scorer, examples: Examples, seed: int) -> Tensor:
    """
    Return logits `[n, V]` of labelled tokens drawn from examples that are spread over the data.
    """
    n = min(SAMPLE_TOKENS, max(1, SAMPLE_LOGITS // scorer.vocab_size))
    rng, found, left = np.random.default_rng(seed), [], n
    rows = np.flatnonzero(examples.labelled)
    candidates = rows[
        np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_EXAMPLES)).round().astype(int)
    ].tolist()
    for tried, i in enumerate(candidates):
        tokens = examples.tokens(range(i, i + 1))
        positions = np.flatnonzero(tokens.labelled)
        share = min(len(positions), -(-left // (len(candidates) - tried)))
        chosen = np.sort(rng.choice(positions, share, replace=False))
        found.append(scorer.logits(tokens.ids.tolist(), chosen))
        left -= share
    return torch.cat(found)
