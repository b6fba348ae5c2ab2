"""What trackers show: every name in a section, and as the docs list them."""

import re
from pathlib import Path

from datasets import Dataset
from transformers.integrations.integration_utils import rewrite_logs

from eaft import EAFTConfig, EAFTTrainer
from tests.conftest import make_model, make_rows, make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "trackers.md"
# Of transformers and TRL, without a row of their own
THEIRS = (
    r"train/(epoch|grad_norm|learning_rate|total_flos|train_\w+|\w+_per_second)"
    r"|eval/(runtime|\w+_per_second)"
)


def test_names_are_those_of_the_docs(tmp_path):
    (tmp_path / "suite.yaml").write_text("suite: tiny\ntasks: [everyday]\nlimit: 2\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say it"}\n')
    args = EAFTConfig(
        str(tmp_path / "out"),
        gate="asft",
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        forgetting_eval_steps=1,
        forgetting_suite=[str(tmp_path / "suite.yaml")],
        target_suite=[str(tmp_path / "suite.yaml")],
        forgetting_prompts=str(tmp_path / "prompts.jsonl"),
    )
    rows = Dataset.from_list(make_rows(8))
    model = make_model(initializer_range=0.8)  # sure of some tokens, unsure of others
    trainer = EAFTTrainer(
        model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer()
    )
    trainer.train()
    logged = rewrite_logs(
        {name: 0 for log in trainer.state.log_history for name in log if name != "step"}
    )
    table = "".join(re.findall(r"^\| `.*\n", PAGE.read_text(), re.MULTILINE))
    documented = re.findall(r"`((?:train|eval)/[\w/]+)`", table)
    names = {name.replace("score/everyday", "score/TASK") for name in logged}
    names.add("train/replay_kl")  # only with replay_loss="kl": test_replay_kl.py
    assert {name for name in names if not re.fullmatch(THEIRS, name)} == set(documented)

    trainer.evaluate({"one": rows, "other": rows})
    one, other = trainer.state.log_history[-2:]
    assert one["eval_one_nll"] == other["eval_other_nll"]
    assert "eval_nll" not in {**one, **other}
