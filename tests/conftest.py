"""A tiny model, tokenizer and data set that need no download."""

import atexit
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

if own_store := "EAFT_CACHE" not in os.environ:  # nothing measured before, nothing left behind
    os.environ["EAFT_CACHE"] = tempfile.mkdtemp(prefix="eaft-measured-")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if not Path("/dev/nvidiactl").exists():  # before anything imports Triton: its kernels run without a GPU
    os.environ["TRITON_INTERPRET"] = "1"
if parallel := "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: a thread for each, and for what they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if own_store:
    atexit.register(shutil.rmtree, os.environ["EAFT_CACHE"], ignore_errors=True)
torch.set_num_threads(1 if parallel else 2)


def let_triton_interpret_xor_with_numpy():
    """Triton interprets sums with numpy, but xor by elements, hundreds of times slower; `tl.topk` is made of xor."""
    try:
        import numpy
        from triton.language.standard import _xor_combine
        from triton.runtime.interpreter import ReduceOps
    except ImportError:
        return
    slow = ReduceOps.apply_impl

    def apply_impl(self, input):
        if self.combine_fn is not _xor_combine:
            return slow(self, input)
        data = numpy.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, input[0].dtype)

    ReduceOps.apply_impl = apply_impl


if os.environ.get("TRITON_INTERPRET") == "1":
    let_triton_interpret_xor_with_numpy()

# ChatML with the markers that assistant_only_loss needs
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """Byte-level: every byte is a token, plus three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=specials[1:2],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# Of every tiny model, whatever its family
SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(seed=0, **overrides):
    """A Llama of two narrow layers with tied embeddings, random but sharp enough that entropies differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **SHAPE,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **overrides,
        }
    )
    return LlamaForCausalLM(config)


def chain_model(tokenizer, *texts, **config):
    """A model that goes on from a token as the first of these texts that has it does, whatever was before it."""
    size = 2 * (max(tokenizer.get_vocab().values()) // 2 + 1)  # a dimension a token: the head reads what follows
    shape = {"vocab_size": size, "hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    shape |= {"max_position_embeddings": 1024, "eos_token_id": tokenizer.eos_token_id}
    model, known = make_model(**shape, **config).eval(), set()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_("norm" in name)
        model.model.embed_tokens.weight.fill_diagonal_(1)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for before, after in itertools.pairwise(ids):
                if before not in known:
                    known.add(before)
                    model.lm_head.weight[after, before] = 2
    return model


def leave():
    """End one of several processes without taking its threads apart: gloo's now and then abort when that is done."""
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


def make_rows(n=16):
    """Prompt-completion rows of different lengths."""
    return [{"prompt": f"{i} plus {i * 3}", "completion": f" is {i * 4}" + "!" * (i % 5)} for i in range(n)]


@pytest.fixture
def dataset():
    return Dataset.from_list(make_rows())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """The tiny model as a folder, as a user would have one."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
