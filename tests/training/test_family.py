"""A run's family of models: against the formula in float64, and LoRA merged by hand."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from eaft.errors import ConfigurationError
from eaft.training.family import Family, between, check_adapter, write_member
from tests.conftest import SHAPE, make_model

IDS = torch.tensor([[1, 7, 30, 4, 200, 11]])


def saved(folder, model, tokenizer=None, **how):
    model.save_pretrained(folder, **how)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def moved(model, by=0.1):
    """A model after training, as far as its weights can tell."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)
    return model


def files(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_full_model_lies_between_base_and_checkpoint(tmp_path, tokenizer, dtype, tied):
    base = saved(tmp_path / "base", make_model(tie_word_embeddings=tied))
    trained = moved(make_model(tie_word_embeddings=tied)).to(dtype)
    run = saved(tmp_path / "run", trained, tokenizer, max_shard_size="20KB")
    assert len(list(run.glob("*.safetensors"))) > 1
    (run / "optimizer.pt").write_text("large")
    (run / "trainer_state.json").write_text("{}")
    for share in (0.0, 0.3, 0.8, 1.0):
        out = tmp_path / f"out-{share}"
        write_member(str(base), run, share, out)
        old, new, written = files(base), files(run), files(out)
        assert written.keys() == new.keys()
        for name, tensor in written.items():
            exact = old[name].double() + share * (new[name].double() - old[name].double())
            # float32 arithmetic, then one rounding to the checkpoint's dtype
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(tensor.double(), exact, rtol=tolerance, atol=1e-6)
            assert tensor.dtype == dtype
        if share == 1.0:
            assert all(torch.equal(written[name], new[name]) for name in new)
        assert (out / "tokenizer.json").is_file()
        assert (out / "generation_config.json").is_file()
        assert not list(out.glob("optimizer*")) + list(out.glob("trainer_state*"))
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        in_place = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        Family(in_place, str(base)).put(run, 1.0)  # what it was before does not matter
        Family(in_place, str(base)).put(run, share)
        assert torch.equal(in_place(IDS).logits, loaded(IDS).logits)


def test_bf16_is_rounded_once():
    # A float32 base between two bf16 numbers must not be rounded before it is used
    base, tuned = torch.tensor([1 + 2**-9]), torch.tensor([1 + 2**-7]).bfloat16()
    exact = base.double() + 0.5 * (tuned.double() - base.double())
    assert between("w", base, tuned, 0.5).double() == exact.bfloat16().double()
    half = torch.tensor([1.0, -1.0]), torch.tensor([1.0 + 2**-7, -1.0 - 2**-7]).bfloat16()
    assert between("w", *half, 0.51).double().abs().tolist() == [1 + 2**-7] * 2
    assert between("w", *half, 0.49).double().abs().tolist() == [1.0] * 2


def test_models_whose_files_have_other_names(tmp_path):
    """transformers fuses Mixtral's experts while it loads them."""
    config = MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    base = saved(tmp_path / "base", model)
    run = saved(tmp_path / "run", moved(model))
    write_member(str(base), run, 0.4, tmp_path / "out")
    old, new, written = files(base), files(run), files(tmp_path / "out")
    assert any(".experts.0." in name for name in old)
    assert old.keys() == written.keys()
    for name, tensor in written.items():
        exact = old[name].double() + 0.4 * (new[name].double() - old[name].double())
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-6)


def test_what_lies_not_between():
    with pytest.raises(ConfigurationError, match="adding tokens"):
        between("embed", torch.zeros(3, 2), torch.zeros(4, 2), 0.5)
    with pytest.raises(ConfigurationError, match="int64 values that training changed"):
        between("count", torch.tensor([1]), torch.tensor([2]), 0.5)
    assert between("count", torch.tensor([2]), torch.tensor([2]), 0.5).tolist() == [2]


LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 32},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
}


def adapter(folder, base, seed, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        task_type="CAUSAL_LM",
        **{"target_modules": ["q_proj", "v_proj"], **settings},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", LORA.values(), ids=LORA)
def test_an_adapter_is_scaled(tmp_path, model_dir, tokenizer, settings):
    first = adapter(tmp_path / "first", model_dir, 0, **settings)
    second = adapter(tmp_path / "second", model_dir, 1, **settings)
    tokenizer.save_pretrained(second)
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    family = Family(PeftModel.from_pretrained(loaded, first).eval(), str(model_dir))
    for share in (0.0, 0.35, 1.0):
        # By hand: W + share * scale * B A
        merged = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
        config = json.loads((second / "adapter_config.json").read_text())
        pairs = load_file(second / "adapter_model.safetensors")
        for name, a in pairs.items():
            if not name.endswith("lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b, last = pairs[name.replace("lora_A", "lora_B")], module.rpartition(".")[2]
            rank = config["rank_pattern"].get(last, config["r"])
            alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            assert a.shape[0] == rank
            merged.get_submodule(module).weight.data += share * scale * b.double() @ a.double()
        expected = merged(IDS).logits
        family.put(second, share)
        in_place = family.model(IDS).logits
        torch.testing.assert_close(in_place.double(), expected, rtol=1e-4, atol=1e-4)
        out = tmp_path / f"out-{share}"
        write_member(str(model_dir), second, share, out)
        base = AutoModelForCausalLM.from_pretrained(model_dir)
        assert torch.equal(PeftModel.from_pretrained(base, out).eval()(IDS).logits, in_place)
        assert (out / "tokenizer.json").is_file()
        assert not (out / "README.md").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases are trained"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_adapters_that_a_scale_does_not_interpolate(settings, says):
    with pytest.raises(ConfigurationError, match=says):
        check_adapter(LoraConfig(task_type="CAUSAL_LM", **settings).to_dict())


def test_only_lora():
    with pytest.raises(ConfigurationError, match="only LoRA"):
        check_adapter({"peft_type": "PREFIX_TUNING"})
