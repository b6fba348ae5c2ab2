"""
Two gloo processes give what one gives, under FSDP2 and DeepSpeed, as accelerate launches them.

DDP is tested through `eaft train` in test_train_command.py.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from eaft import cli
from eaft.errors import ConfigurationError
from eaft.training.head import GatedLMHead
from eaft.training.reference import make_reference
from tests.conftest import make_model, make_rows
from tests.processes import run_ranks
from tests.training import deepspeed_check, fsdp_check, fsdp_on_cpu
from tests.training.deepspeed_check import train as train_a_few_steps

FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # what `accelerate config` proposes
    },
}


def launch(folder, config, function, *args):
    """
    Call a function in two processes on the CPU, in the environment that
    `accelerate launch --config_file` makes.
    """
    file, made = folder / "accelerate.yaml", {}
    file.write_text(
        yaml.safe_dump({"num_processes": 2, "use_cpu": True, "main_process_port": 0, **config})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda args: made.update(os.environ))
        launch_command(launch_command_parser().parse_args(["--config_file", str(file), "script"]))
    run_ranks(function, *args, environment=made, timeout=120)


def save(folder, tokenizer, **overrides):
    """The tiny model as a folder."""
    make_model(**overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").named_parameters())


NAMES = ("loss", "nll", "nll_high_entropy", "mean_gate", "grad_norm", "kl", "eval_loss")


def assert_logs_agree(one, two, tolerance, names=NAMES):
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(names):
            # The first step's divergence is that of a model from itself: 0, within rounding
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-6), (name, a, b)


@pytest.mark.parametrize(
    ("gate", "tied", "precision"),
    [("eaft", False, "no"), ("sft-kl", True, "no"), ("sft-kl", False, "bf16")],
)
def test_fsdp2_as_accelerate_wraps_it(tmp_path, tokenizer, gate, tied, precision):
    """
    As a user launches `eaft train`: by layers, the last group [norm, lm_head], or with the tied
    embedding.
    """
    model = save(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", make_rows()), ("test", make_rows()[:4])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model_name_or_path",
        model,
        "--dataset_name",
        data,
        "--gate",
        gate,
        "--learning_rate",
        "1e-3",
    ]
    flags += [
        "--max_steps",
        4,
        "--logging_steps",
        1,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
        "--use_cpu",
    ]
    flags += ["--bf16", precision == "bf16", "--report_to", "none", "--disable_tqdm", "true"]
    if drift := gate == "eaft":
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(3)))
        flags += [
            "--forgetting_eval_steps",
            2,
            "--forgetting_prompts",
            prompts,
            "--per_device_eval_batch_size",
            2,
        ]
        record = ["eval", model, "--record", "--prompts", prompts, "--batch_size", 2]
        assert cli.main(list(map(str, record))) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    batch = "--per_device_train_batch_size"
    assert cli.main(["train", *map(str, flags), "--output_dir", str(one), batch, "4"]) == 0
    config = {**FSDP2, "mixed_precision": precision}
    launch(tmp_path, config, fsdp_on_cpu.main, "train", *flags, "--output_dir", two, batch, 2)

    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    drifts = [[log["eval_drift"] for log in side if "eval_drift" in log] for side in lines]
    assert len(drifts[1]) == (3 if drift else 0)
    assert drifts[1] == pytest.approx(drifts[0], rel=1e-4)  # step 0 is 0 from itself
    assert "score/everyday" not in str(lines[1])  # tasks need the whole model
    logs = [[log for log in side if "eval_drift" not in log][:6] for side in lines]
    assert [("eval_loss" in log, "loss" in log) for log in logs[0]] == [
        *[(False, True)] * 2, (True, False), *[(False, True)] * 2, (True, False),
    ]  # fmt: skip
    if (
        precision == "bf16"
    ):  # FSDP2 rounds what the model returns, and gradients before it averages them
        assert_logs_agree(*logs, 2**-8, ("loss", "nll", "grad_norm", "eval_loss"))
        return
    assert_logs_agree(*logs, 1e-4)
    start, a, b = weights(model), weights(one), weights(two)
    moved = sum((a[n] - start[n]).square().sum() for n in a).sqrt()
    assert sum((a[n] - b[n]).square().sum() for n in a).sqrt() / moved < 1e-3


def test_fsdp2_gradients_reference_and_adapters(tmp_path, tokenizer):
    """
    See fsdp_check.py; then LoRA with a KL term, whose reference is the sharded policy itself, as
    one process.
    """
    model = save(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    launch(tmp_path, FSDP2, fsdp_check.main, str(model), str(tmp_path / "two"))
    two = json.loads((tmp_path / "two" / "logs.json").read_text())
    assert_logs_agree(
        train_a_few_steps(str(model), str(tmp_path / "one"), "sft-kl", True), two, 1e-4
    )


@pytest.mark.parametrize("sharding", ["ZeRO-3", "FSDP1"])
def test_a_copy_that_cannot_be_sharded_is_refused(sharding):
    zero3 = sharding == "ZeRO-3"
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=3), fsdp_plugin=SimpleNamespace(fsdp_version=1)
    )
    trainer = SimpleNamespace(model=make_model(), args=SimpleNamespace(gate="sft-kl"))
    trainer.accelerator = SimpleNamespace(state=state)
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = zero3, not zero3
    with pytest.raises(ConfigurationError, match=f"not with .*{sharding}"):
        make_reference(trainer)


@pytest.mark.parametrize(
    ("stage", "gate", "trained"), [(2, "eaft", "all"), (3, "eaft", "all"), (3, "sft-kl", "LoRA")]
)
def test_zero(tmp_path, tokenizer, stage, gate, trained):
    pytest.importorskip("deepspeed")
    model = save(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
    }  # else parameters this small stay whole
    content = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({**content, **dict.fromkeys(sizes, "auto")}))
    config = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(file), "zero3_init_flag": stage == 3},
    }
    args = (str(model), str(tmp_path / "two"), gate, trained)
    launch(tmp_path, config, deepspeed_check.main, *args)
    two = json.loads((tmp_path / "two" / "logs.json").read_text())
    one = train_a_few_steps(str(model), str(tmp_path / "one"), gate, trained == "LoRA")
    drifts = [[log["eval_drift"] for log in logs if "eval_drift" in log] for logs in (one, two)]
    assert drifts[1] == pytest.approx(drifts[0], rel=1e-3)
    assert drifts[1][0] == 0 < drifts[1][1] < drifts[1][2]
    one, two = ([log for log in logs if "eval_drift" not in log] for logs in (one, two))
    assert len(one) == 5
    assert_logs_agree(one, two, 1e-4)
    assert ("kl" in one[0]) == (gate == "sft-kl")


def tensor_parallel(folder):
    """The loss and gradients of a model that transformers shards, beside the whole model's."""
    dist.init_process_group("gloo")
    ids = torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    results = []
    for options in ({}, {"tp_plan": "auto"}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).train()
        head = GatedLMHead(model, "eaft")
        output = model(**inputs)
        output.loss.backward()
        statistics = head.statistics(model, ids, input_ids=ids)
        results.append((output.loss.detach(), head.losses.weights, statistics.rank, model))
    whole, sharded = results
    weight = sharded[3].lm_head.weight
    assert weight.to_local().shape[0] < len(weight)
    for actual, expected in zip(sharded[:3], whole[:3], strict=True):
        torch.testing.assert_close(actual, expected)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        gradient = sharded[3].get_parameter(name).grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, whole[3].get_parameter(name).grad, msg=name)
    dist.destroy_process_group()


def test_tensor_parallelism_shards_the_vocabulary(tmp_path, tokenizer):
    run_ranks(tensor_parallel, save(tmp_path / "model", tokenizer))
