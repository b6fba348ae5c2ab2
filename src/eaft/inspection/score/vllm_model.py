"""A model in vLLM, which scores examples by the log-probabilities of the K likeliest tokens."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eaft.errors import ConfigurationError
from eaft.evaluation.lm_eval_models import load as load_lm
from eaft.evaluation.lm_eval_models import release
from eaft.evaluation.protocol import Protocol
from eaft.inspection.folder import STATISTICS, WHOLE_VOCABULARY, statistics_of
from eaft.inspection.score.examples import Prompt, Rollout, Tokens
from eaft.inspection.score.model import GPU_BATCH_TOKENS, Settings
from eaft.models import text_config
from eaft.objective.statistics import TokenStatistics, entropy_from_log_probs, usable_top_k


class VLLMModel:
    """
    A model in vLLM that scores examples, as far as vLLM can tell, and samples answers.

    vLLM returns the log-probability of each token of a prompt, its rank, and the log-probabilities
    of the K likeliest tokens. So it has all columns but `WHOLE_VOCABULARY`.

    Args:
        model: a Hub id, a folder, or a folder with a PEFT adapter.
        tokenizer: of the base model.
        settings: how it computes; `model_init_kwargs` are vLLM's own arguments.
        context: the most tokens of an example and of an answer with its prompt.
        is_base: whether the flag `model_revision` is of this model.

    Raises:
        ConfigurationError: vLLM cannot load it.
    """

    columns = tuple(field.name for field in STATISTICS if field.name not in WHOLE_VOCABULARY)
    batch_tokens = GPU_BATCH_TOKENS

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        settings: Settings,
        context: int,
        is_base: bool = True,
    ) -> None:
        self.name, args = model, settings.args
        model_args = {"trust_remote_code": args.trust_remote_code}
        if is_base and settings.model_args.model_revision is not None:
            model_args["revision"] = settings.model_args.model_revision
        self.vocab_size = int(text_config(model, model_args).vocab_size)
        self.top_k = usable_top_k(args.gate_top_k, self.vocab_size)
        # vLLM generates at least one token
        model_args |= {"max_model_len": context + 1, "max_logprobs": self.top_k}
        model_args |= args.model_init_kwargs or {}
        dtype = settings.autocast or settings.model_args.dtype or "auto"
        protocol = Protocol(
            backend="vllm", dtype=str(dtype).removeprefix("torch."), model_args=model_args
        )
        self.lm = load_lm(model, tokenizer, protocol)

    def free(self) -> None:
        """End vLLM's processes."""
        release(self.lm)

    def generate(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[Any]:
        """Return vLLM's output for each prompt, with the arguments of its `SamplingParams`."""
        from vllm import SamplingParams

        self.lm.generated = deque()  # lm-eval's record of each answer
        sampling = [SamplingParams(**arguments) for arguments in parameters]
        outputs: list[Any] = self.lm._model_generate(
            prompts, generate=True, sampling_params=sampling
        )
        return outputs

    def sample(self, prompts: list[Prompt], max_new_tokens: int, seed: int) -> list[Rollout]:
        """Return an answer to each prompt as `rollouts.sample` does."""
        parameters = [
            {"temperature": 1.0, "max_tokens": max_new_tokens, "seed": seed + i}
            for i in range(len(prompts))
        ]
        outputs = self.generate([prompt.ids for prompt in prompts], parameters)
        return [
            Rollout(prompt.row, prompt.ids, list(output.outputs[0].token_ids))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def statistics(
        self, tokens: Tokens, batch: list[int]
    ) -> tuple[TokenStatistics, NDArray[np.integer]]:
        """Return the statistics of some examples, as `ScoringModel.statistics` does."""
        parts = [slice(tokens.starts[i], tokens.starts[i] + tokens.lengths[i]) for i in batch]
        ask = {
            **{"temperature": 0.0, "max_tokens": 1, "detokenize": False},
            **{"prompt_logprobs": self.top_k, "flat_logprobs": True},
        }
        rows = [tokens.ids[part].tolist() for part in parts]
        outputs = self.generate(rows, [ask] * len(rows))
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in self.columns}
        places = []
        for row, part, output in zip(rows, parts, outputs, strict=True):
            labelled = np.flatnonzero(tokens.labelled[part])
            places.append(labelled + part.start)
            scored = read_log_probs(output.prompt_logprobs, row, self.top_k)
            for name, values in scored.items():
                columns[name].append(values[labelled - 1])
        joined = {name: torch.cat(parts) for name, parts in columns.items()}
        statistics = statistics_of(joined, self.top_k)
        return statistics, np.concatenate(places)


def read_log_probs(flat: Any, row: list[int], top_k: int) -> dict[str, torch.Tensor]:
    """
    Return the columns of `VLLMModel` for all tokens of an example but the first, `[n - 1]` each.

    Args:
        flat: vLLM's `FlatLogprobs` of the prompt: for each token but the first its own entry, then
            the entries of the K likeliest tokens in order.
        row: the `n` token ids of the example.
        top_k: K.

    Raises:
        ConfigurationError: the entries are of another form.
    """
    ids = np.array(flat.token_ids, np.int64)
    if len(ids) != (len(row) - 1) * (top_k + 1) or (ids[:: top_k + 1] != row[1:]).any():
        raise ConfigurationError(
            "backend='vllm': this version of vLLM returns other log-probabilities than those of"
            f" each token and of the {top_k} likeliest: take --backend hf."
        )
    log_probs = torch.tensor(flat.logprobs, dtype=torch.float32).view(-1, top_k + 1)
    label, likeliest = log_probs[:, 0], log_probs[:, 1:]
    # vLLM's rank also counts tokens that are as likely as the label
    rank = torch.tensor(flat.ranks[:: top_k + 1], dtype=torch.int64)
    among = 1 + (likeliest > label.unsqueeze(1)).sum(1)
    return {
        "log_prob": label,
        "top_k_entropy": entropy_from_log_probs(likeliest.log_softmax(-1)),
        "first_choice": torch.from_numpy(ids).view(-1, top_k + 1)[:, 1],
        "first_prob": likeliest[:, 0].exp(),
        "rank": torch.where(label >= likeliest[:, -1], among, rank),
    }
