"""
`eaft train --dry_run`: counts against published and hand-made numbers; nothing written, no weights
needed.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    Glm4Config,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import ModelConfig

from eaft import EAFTConfig, cli
from eaft.errors import ConfigurationError
from eaft.training.arguments import parse
from eaft.training.plan import (
    GIB,
    GPUS,
    RESERVE,
    Launch,
    count_active,
    count_parameters,
    count_unquantized,
    flops,
    memory,
    meta_model,
    read_launch,
)
from tests.conftest import make_model, make_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
# From the models' own config.json on the Hub
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
QWEN25_32B = Qwen2Config(
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
GLM4_9B = Glm4Config(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=False,
)
QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)
MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
)


def arguments(tmp_path, **changes):
    return EAFTConfig(str(tmp_path / "out"), use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("config", "published"),
    [(QWEN3_4B, 4.02e9), (QWEN25_32B, 32.76e9), (GLM4_9B, 9.40e9)],
    ids=["4B", "32B", "9B"],
)
def test_parameters_are_the_published_ones(tmp_path, config, published):
    total, trainable = count_parameters(meta_model(config, ModelConfig(), arguments(tmp_path)))
    assert total == trainable == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(QWEN3_30B_A3B, 30.5e9, 3.3e9), (MIXTRAL_8X7B, 46.7e9, 12.9e9)],
    ids=["30B", "8x7B"],
)
def test_parameters_of_experts_are_the_published_ones(tmp_path, config, total, active):
    model = meta_model(config, ModelConfig(), arguments(tmp_path))
    assert count_parameters(model)[0] == pytest.approx(total, rel=5e-3)
    assert count_active(model, config) == pytest.approx(
        active, rel=2e-2
    )  # they round to two digits


@pytest.mark.parametrize(
    "family", ["granitemoe", "phimoe", "hunyuan_v1_moe", "deepseek_v3", "llama"]
)
def test_active_parameters_by_hand(tmp_path, family):
    """Two layers of hidden size 32; of 4 experts of 3 x 16 x 32 a token goes through 2."""
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
    }
    sizes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "hunyuan_v1_moe":
        experts = {"num_experts": 4, "moe_topk": [2, 2]}
    if family == "deepseek_v3":
        sizes |= {
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
        }
        experts = {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
        }
        experts |= {"topk_group": 1}
    config = AutoConfig.for_model(family, **sizes, **({} if family == "llama" else experts))
    model = meta_model(config, ModelConfig(), arguments(tmp_path))
    routed_layers = {"llama": 0, "deepseek_v3": 1}.get(family, 2)
    idle = count_parameters(model)[0] - count_active(model, config)
    assert idle == routed_layers * (4 - 2) * 3 * 16 * 32


def test_adapters_are_counted(tmp_path):
    lora = ModelConfig(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    total, trainable = count_parameters(meta_model(make_model().config, lora, arguments(tmp_path)))
    assert trainable == 2 * (
        32 * 4 + 4 * 32 + 32 * 4 + 4 * 16
    )  # two layers, two factors of rank 4 each
    assert total == sum(p.numel() for p in make_model().parameters()) + trainable


def test_memory_by_hand(tmp_path):
    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_checkpointing=False, bf16=False
    )
    parts = memory(
        QWEN3_4B,
        ModelConfig(dtype="float32"),
        args,
        4_000_000_000,
        4_000_000_000,
        1000,
        Launch(8, 8, 8, 8),
    )
    assert parts["weights"] == parts["gradients"] == pytest.approx(4e9 * 4 / 8 / GIB)
    assert parts["optimizer states (adamw_torch_fused)"] == pytest.approx(4e9 * 8 / 8 / GIB)
    layer = 2 * (5 * 2560 + 2 * 4096 + 2 * 1024 + 4 * 9728)
    assert parts["activations of 2,000 tokens"] == pytest.approx(2000 * 36 * layer / GIB)
    assert parts["gathered layers and head"] == pytest.approx(
        4 * (4e9 * 2 / 36 + 151936 * 2560) / GIB
    )
    args = arguments(
        tmp_path, gate="sft-kl", per_device_train_batch_size=2, gradient_checkpointing=True
    )
    parts = memory(QWEN3_4B, ModelConfig(dtype="bfloat16"), args, 10**9, 10**9, 1000, Launch())
    assert parts["reference model"] == parts["weights"] == pytest.approx(2e9 / GIB)
    assert parts["activations of 2,000 tokens"] == pytest.approx(
        2000 * (36 * 2 * 2560 + layer) / GIB
    )


def test_memory_of_launches_by_hand(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True)
    ddp = memory(QWEN3_4B, ModelConfig(dtype="float32"), args, 10**9, 10**9, 1000, Launch(4))
    assert ddp["DDP's buckets of gradients"] == ddp["gradients"] == pytest.approx(4e9 / GIB)
    upcast = memory(
        QWEN3_4B,
        ModelConfig(dtype="bfloat16"),
        args,
        10**9,
        10**9,
        1000,
        Launch(8, 8, 8, 8, upcast=True),
    )
    assert upcast["weights"] == upcast["gradients"] == pytest.approx(4e9 / 8 / GIB)
    offload = memory(
        QWEN3_4B, ModelConfig(), args, 10**9, 10**9, 1000, Launch(8, 8, 8, 8, offload=True)
    )
    assert [*offload.values()][:3] == [0, 0, 0]


HEAD, KL = "head: logits of a chunk, gradient sum", "KL term: second chunk, reference's output"
CHUNK = 2000 * 151936 * 2  # of 2,000 tokens in 16 bit, which is one


def test_memory_of_the_head_by_hand(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=1, bf16=True)
    sums = 4 * 151936 * 2560
    half = ModelConfig(dtype="bfloat16")
    one, two = (
        memory(QWEN3_4B, half, args, 10**9, 10**9, length, Launch())[HEAD]
        for length in (8000, 16_384)
    )
    assert one == pytest.approx(
        (8000 * 151936 * 2 + sums / 2) / GIB
    )  # a single chunk has no float32 sum
    assert two == pytest.approx((8192 * 151936 * 2 + sums) / GIB)


def test_memory_of_a_kl_term_by_hand(tmp_path):
    """Two rows of 1,000 tokens of hidden size 2,560."""
    args = arguments(tmp_path, gate="sft-kl", per_device_train_batch_size=2, bf16=True)
    half, head = ModelConfig(dtype="bfloat16"), 151936 * 2560
    one = memory(QWEN3_4B, half, args, 10**9, 10**9, 1000, Launch())
    assert one[KL] == pytest.approx((CHUNK + 2000 * 2560 * 2) / GIB)
    # FSDP2 keeps what is trained in float32; the reference stays as it was loaded, a shard of it,
    # and its head is whole
    fsdp2 = memory(QWEN3_4B, half, args, 10**9, 10**9, 1000, Launch(8, 8, 8, 8, upcast=True))
    assert fsdp2["weights"] == pytest.approx(4e9 / 8 / GIB)
    assert fsdp2["reference model"] == pytest.approx(2e9 / 8 / GIB)
    assert fsdp2["gathered layers and head"] == pytest.approx(2 * (1e9 * 2 / 36 + head) / GIB)
    assert fsdp2[KL] == pytest.approx((CHUNK + 2000 * 2560 * 2 + head * 2) / GIB)
    # LoRA in float32 under autocast: no second model, but its head is cast for the reference too
    lora = memory(QWEN3_4B, ModelConfig(dtype="float32"), args, 10**9, 10**6, 1000, Launch())
    assert "reference model" not in lora
    assert lora[KL] == pytest.approx((CHUNK + 2000 * 2560 * 4 + head * 2) / GIB)
    offload = memory(QWEN3_4B, half, args, 10**9, 10**9, 1000, Launch(8, 8, 8, 8, offload=True))
    assert offload["reference model"] == 0


def test_activations_of_experts_by_hand(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_checkpointing=False)
    parts = memory(MIXTRAL_8X7B, ModelConfig(dtype="bfloat16"), args, 10**9, 10**9, 10, Launch())
    layer = 2 * (5 * 4096 + 2 * 4096 + 2 * 1024 + 2 * 4 * 14336)
    assert parts["activations of 10 tokens"] == pytest.approx(10 * 32 * layer / GIB)


def test_memory_of_quantized_experts_by_hand(tmp_path):
    """
    bitsandbytes makes 4 bits of Mixtral's attention; experts, router, norms, embeddings, head and
    adapters stay.
    """
    args, attention = arguments(tmp_path, bf16=True), 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    lora = ModelConfig(
        dtype="bfloat16", load_in_4bit=True, use_peft=True, lora_target_modules=["q_proj", "v_proj"]
    )
    model = meta_model(MIXTRAL_8X7B, lora, args)
    total, trainable = count_parameters(model)
    unquantized = count_unquantized(model)
    assert unquantized == total - attention
    parts = memory(MIXTRAL_8X7B, lora, args, total, trainable, 10, Launch(), unquantized)
    assert parts["weights"] == pytest.approx((attention / 2 + unquantized * 2) / GIB)


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if "fsdp2" not in r.name], ids=lambda r: r.stem
)
def test_paper_recipes_fit_eight_a100(recipe, monkeypatch):
    """With rows as long as max_length, by the plan's own formula and the real models' shapes."""
    monkeypatch.chdir(ROOT)
    (_, args, model_args, *_), launch_args, _ = parse(["--config", str(recipe), "--use_cpu"])
    config = {"qwen2.5-32b": QWEN25_32B, "glm4-9b": GLM4_9B}.get(
        recipe.stem.removesuffix("-math"), QWEN3_4B
    )
    total, _ = count_parameters(meta_model(config, model_args, args))
    parts = memory(
        config, model_args, args, total, total, args.max_length, read_launch(launch_args)
    )
    assert RESERVE * sum(parts.values()) + 1 <= GPUS["A100 80 GB"][0]


def test_operations_by_hand(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=False)
    assert flops(QWEN3_4B, args, 100, True, 10, 0) == 6 * 100 * 10
    assert flops(QWEN3_4B, args, 100, False, 10, 0) == 4 * 100 * 10
    assert flops(QWEN3_4B, args, 0, True, 1, 50) == 3 * 2 * 36 * 32 * 128 * 50
    assert (
        flops(
            QWEN3_4B,
            arguments(tmp_path, gradient_checkpointing=True, gate="sft-kl"),
            100,
            True,
            10,
            0,
        )
        == 10 * 1000
    )


def test_measured_peak_is_near_the_estimate(tmp_path):
    """
    README: SmolLM2-135M in float32 on CPU, batch 4, rows of some 500 tokens: 4.1 GiB, of which 0.6
    are libraries.
    """
    smol = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    total, _ = count_parameters(meta_model(smol, ModelConfig(), arguments(tmp_path)))
    assert total == 134_515_008  # the model's own count
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_checkpointing=False)
    parts = memory(smol, ModelConfig(dtype="float32"), args, total, total, 278, Launch())
    assert sum(parts.values()) == pytest.approx(4.1, rel=0.35)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"num_processes": 4}, Launch(4)),
        ({"num_processes": 8, "distributed_type": "FSDP"}, Launch(8, 8, 8, 8)),
        (
            {
                "num_processes": 8,
                "distributed_type": "FSDP",
                "mixed_precision": "bf16",
                "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
            },
            Launch(8, 8, 8, 8, offload=True, upcast=True),
        ),
        (
            {
                "num_processes": 2,
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 2},
            },
            Launch(2, 1, 2, 2),
        ),
    ],
)
def test_launch(tmp_path, content, expected):
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(content))
    assert read_launch(["--config_file", str(file)]) == expected


@pytest.fixture
def no_weights(tmp_path, model_dir):
    """A model's folder with config and tokenizer only, and a data file."""
    folder = tmp_path / "config_only"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((model_dir / name).read_text())
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return [
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_dry_run_counts_and_writes_nothing(no_weights, tmp_path, tokenizer, capsys, flag):
    before = sorted(tmp_path.rglob("*"))
    steps = ["--per_device_train_batch_size", "4", "--num_train_epochs", "3"]
    assert (
        cli.main(["train", *no_weights, *steps, flag, "--gate", "masked", "--replay", "0.2"]) == 0
    )
    assert sorted(tmp_path.rglob("*")) == before
    output = capsys.readouterr().out
    tokens = [
        (len(tokenizer(r["prompt"])["input_ids"]), len(tokenizer(r["completion"])["input_ids"]) + 1)
        for r in make_rows()
    ]
    labelled = sum(completion for _, completion in tokens)
    assert f"16 rows, {sum(map(sum, tokens)):,} tokens an epoch, {labelled:,} labelled" in output
    assert f"longest row {max(map(sum, tokens))}" in output
    assert "not counted: 4 replayed rows" in output
    assert f"Parameters   {sum(p.numel() for p in make_model().parameters()):,}" in output
    assert "12 of 4 rows (4 x 1 x 1 processes)" in output
    assert "A100 80 GB" in output
    assert "this machine" in output


def test_dry_run_says_what_this_machine_refuses(no_weights, capsys, monkeypatch):
    """Without a GPU the same command stops without --use_cpu, whatever the plan for one says."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cli.main(["train", *no_weights, "--bf16", "true", "--dry_run", "--use_cpu"]) == 0
    assert "stops" not in capsys.readouterr().out
    assert cli.main(["train", *no_weights, "--bf16", "true", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "On this machine eaft train stops: use_cpu=False, and no GPU for bf16" in output
    assert output.count("to train on the CPU, add --use_cpu") == 1
    assert "copies of weights in 16 bit" in output  # the plan is of bfloat16 all the same


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_to_add(tmp_path, recwarn):
    with pytest.raises(ConfigurationError, match="to train on the CPU, add --use_cpu"):
        EAFTConfig(str(tmp_path / "out"), bf16=True)
    EAFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True)
    assert not [told for told in recwarn if "gradient_checkpointing" in str(told.message)]


def test_dry_run_of_experts_counts_the_time_of_those_a_token_goes_through(no_weights, capsys):
    """
    Two layers of 64 experts of 3 x 64 x 32, a token through one: all but 3% of the model is idle.
    """
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=264,
        hidden_size=32,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=64,
        num_experts_per_tok=1,
        tie_word_embeddings=True,
    )
    config.save_pretrained(no_weights[1])
    flags = [
        "--per_device_train_batch_size",
        "16",
        "--num_train_epochs",
        "1",
        "--gradient_checkpointing",
        "false",
    ]
    assert cli.main(["train", *no_weights, *flags, "--dry_run"]) == 0
    output = capsys.readouterr().out
    found = re.search(r"Parameters +(\S+), .*, (\S+) used for each", output)
    total, active = (int(number.replace(",", "")) for number in found.groups())
    assert total - active == 2 * 63 * 3 * 64 * 32
    tokens = int(re.search(r"rows, (\S+) tokens an epoch", output)[1].replace(",", ""))
    attention = 2 * 2 * 32 * tokens / 16
    assert float(re.search(r"(\S+) FLOP", output)[1].strip("(")) == pytest.approx(
        tokens * 3 * (2 * active + attention), rel=0.05
    )


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if "fsdp2" not in r.name], ids=lambda r: r.stem
)
def test_paper_recipes(recipe, no_weights, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)  # they name their accelerate config from there
    assert cli.main(["train", "--config", str(recipe), *no_weights, "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "of 64 rows" in output
    assert "8 processes" in output
    content = yaml.safe_load(recipe.read_text())
    assert (content["learning_rate"], content["num_train_epochs"], content["max_length"]) == (
        1e-5,
        10,
        16384,
    )
    assert (content["lr_scheduler_type"], content["warmup_steps"]) == ("cosine", 0.03)


def test_bad_recipe(no_weights, tmp_path, capsys):
    forgetting = ["--dry_run", "--forgetting_eval_steps", "5", "--forgetting_suite"]
    assert cli.main(["train", *no_weights, *forgetting, "evryday"]) == 2
    assert "no suite and no lm-eval task 'evryday'" in capsys.readouterr().err
    sharded = ["--accelerate_config", str(ROOT / "recipes/paper/fsdp2.yaml")]
    assert cli.main(["train", *no_weights, *forgetting, "everyday", *sharded]) == 2
    assert "with FSDP or DeepSpeed only drift" in capsys.readouterr().err
    assert cli.main(["train", *no_weights, "--dry_run", "--gate", "eatf"]) == 2
    assert "gate='eatf' is unknown" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    assert cli.main(["train", *no_weights, "--dry_run"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert torch.get_default_device().type == "cpu"
