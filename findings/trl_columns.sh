#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0
# Behaviour: what SFTTrainer trains depends on the names of columns that it was not told of.
#   formatting_func is called and its text thrown away when the rows also have "messages", or
#   "prompt" and "completion" (with completion_only_loss=False, which the error for True advises);
#   with "conversations" its text is trained. And a "text" column next to "prompt" and "completion"
#   gets the EOS in place of the completion, so that none is trained.
# Whom it hurts: who formats conversations in a way of their own, and trains the chat template; who
#   keeps the whole text as a column, and gets a model that does not stop. The trainer says nothing.
# Guess beforehand: a formatting_func decides alone, and a column that is not used changes nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/hf"
"$work/venv/bin/python" - "$work" 2> "$work/log" <<'E' || { cat "$work/log"; exit 1; }
import sys
from importlib.metadata import version

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

print({name: version(name) for name in ("torch", "transformers", "trl")})
vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<eos>", "<pad>"])}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
sizes = dict(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))


def trained(row, formatting_func=None, **settings):
    args = SFTConfig(sys.argv[1], use_cpu=True, bf16=False, report_to=[], **settings)
    rows = Dataset.from_list([row])
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, formatting_func=formatting_func
    )
    text = tokenizer.decode([label for label in trainer.train_dataset[0]["labels"] if label != -100])
    print(f"{'formatting_func and ' * bool(formatting_func)}{sorted(row)}: loss on {text!r}")
    return text


def format_row(row):
    return "Q: Hi A: Yo"


chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
pair = {"prompt": "Hi ", "completion": "Yo"}
assert trained({"question": "Hi", "answer": "Yo"}, format_row) == "Q: Hi A: Yo<eos>"
assert trained({"conversations": chat}, format_row) == "Q: Hi A: Yo<eos>"
ignored = trained({"messages": chat}, format_row), trained(pair, format_row, completion_only_loss=False)
assert not any(text.startswith("Q:") for text in ignored), "changed: formatting_func holds"
assert trained(pair) == "Yo<eos>"
assert trained({**pair, "text": "Hi Yo"}) == "Yo", "changed: the completion ends in EOS"
E
