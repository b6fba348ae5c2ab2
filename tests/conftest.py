"""A tiny model, tokenizer and data set that need no download."""

import atexit
import functools
import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path

if own_store := "EAFT_CACHE" not in os.environ:  # nothing measured before, nothing left behind
    os.environ["EAFT_CACHE"] = tempfile.mkdtemp(prefix="eaft-measured-")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if not Path(
    "/dev/nvidiactl"
).exists():  # before anything imports Triton: its kernels run without a GPU
    os.environ["TRITON_INTERPRET"] = "1"
if (
    parallel := "PYTEST_XDIST_WORKER" in os.environ
):  # `pytest -n`: a thread for each, and for what they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from accelerate.utils import imports as accelerate_imports
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if own_store:
    atexit.register(shutil.rmtree, os.environ["EAFT_CACHE"], ignore_errors=True)
torch.set_num_threads(1 if parallel else 2)


def speed_up_tritons_interpreter():
    """
    Let Triton's interpreter select the top K with numpy, and prepare its language once a launch.

    Its own `tl.topk` is a bitonic sort of hundreds of interpreted operations, and it prepares the
    language anew for every function that a kernel calls: nine tenths of the time of a small kernel.
    Neither is code of ours.
    """
    try:
        import numpy
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return

    def topk(x, k, dim=None):
        assert dim is None
        k = getattr(k, "value", k)
        data = numpy.ascontiguousarray(numpy.sort(x.handle.data, axis=-1)[..., ::-1][..., :k])
        kind = language.core.block_type(x.dtype, list(data.shape))
        return language.core.tensor(interpreter.TensorHandle(data, x.dtype.scalar), kind)

    topk.tritons = language.topk  # for the test that both are the same
    language.topk = topk
    launch, prepared = interpreter.GridExecutor.__call__, set()

    def launch_anew(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch_anew, call


if os.environ.get("TRITON_INTERPRET") == "1":
    speed_up_tritons_interpreter()
# accelerate reads packages' metadata at every step
accelerate_imports._is_package_available = functools.cache(accelerate_imports._is_package_available)


def pytest_collection_finish():
    """
    Leave all that was imported out of garbage collection.

    Each training calls it twice, and would spend half of its time among the objects of torch.
    """
    gc.collect()
    gc.freeze()


# ChatML with the markers that assistant_only_loss needs
# The flags of `eaft train` for a small model on a CPU
TINY_TRAINING = ("--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--bf16", "false")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] =="
    " 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else"
    " %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
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
    """
    A Llama of two narrow layers with tied embeddings, random but sharp enough that entropies
    differ.
    """
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
    """
    A model that goes on from a token as the first of these texts that has it does, whatever was
    before it.
    """
    size = 2 * (
        max(tokenizer.get_vocab().values()) // 2 + 1
    )  # a dimension a token: the head reads what follows
    shape = {
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
    }
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


def pytest_terminal_summary(terminalreporter):
    """
    Say how many bad inputs were tried (test_bad_inputs.py), also by the processes of `pytest -n`.
    """
    reports = [
        report
        for kind in ("passed", "failed", "error")
        for report in terminalreporter.getreports(kind)
    ]
    tried = sum(
        n
        for r in reports
        if r.when == "call"
        for name, n in r.user_properties
        if name == "bad_inputs"
    )
    if tried:
        terminalreporter.write_line(f"{tried} bad inputs were tried over all commands")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


def make_rows(n=16):
    """Prompt-completion rows of different lengths."""
    return [
        {"prompt": f"{i} plus {i * 3}", "completion": f" is {i * 4}" + "!" * (i % 5)}
        for i in range(n)
    ]


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
