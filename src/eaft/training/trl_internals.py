"""
What we use of TRL and transformers that they do not promise to keep: every such name stands here.

`tests/training/test_internals.py` says which of them the installed version lacks. What `trl` itself
exports is imported where it is used.
"""

from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence as subtract_subsequence
from trl.data_utils import maybe_convert_to_chatml
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import (
    create_model_from_path,
    get_config_model_id,
    global_then_local_main_first,
)

__all__ = [
    "DataCollatorForLanguageModeling",  # makes a batch of rows with `input_ids` and `labels`
    "create_model_from_path",  # loads a model as `trl sft` does, by its name and keywords
    "get_config_model_id",  # the Hub id or folder of a model, from its config
    "get_training_chat_template",  # a chat template that marks the assistant's turns
    "global_then_local_main_first",  # one process computes a data set, the others read its cache
    "has_generation_markers",  # whether a chat template marks the assistant's turns
    "maybe_convert_to_chatml",  # rows with `from` and `value` get `role` and `content`
    "resolve_accelerate_config_argument",  # `--accelerate_config` as flags of `accelerate launch`
    "subtract_subsequence",  # a command line without the flags that were consumed
]

# Attributes and methods of `SFTTrainer` that `EAFTTrainer` and its users read or override
TRAINER_ATTRIBUTES = {
    "_get_grad_norm": "overridden: a gradient that is not finite, or 0, stops training",
    "_is_vision_dataset": "whether a row can be shown as text",
    "_prepare_dataset": "overridden: rows are followed; `prepare_rows` calls it on its own",
    "_run_epoch": "overridden: no step after the last",
    "_save": "overridden: the generation config goes with an adapter",
    "_set_signature_columns_if_needed": "overridden: our columns reach the collator",
    "_signature_columns": "the columns that reach the collator",
    "_skip_prepare_dataset": "whether TRL leaves the rows as they are",
    "_tag_names": "tags of the model card",
    "_total_train_tokens": "tokens trained on, for the speed",
    "router_aux_loss_coef": "set to 0 in evaluation, so that `eval_loss` is the nll",
}
