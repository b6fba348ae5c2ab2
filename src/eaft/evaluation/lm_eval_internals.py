"""
What we use of lm-eval that it does not promise to keep: every such name stands here.

lm-eval is an extra, so a name is imported when it is first asked for. The test
`tests/evaluation/test_lm_eval_internals.py` says which of them the installed version lacks.
"""

from importlib import import_module
from typing import Any

# Name here -> module of lm-eval, and name there (None: the module itself)
NAMES: dict[str, tuple[str, str | None]] = {
    "HFLM": ("lm_eval.models.huggingface", "HFLM"),  # runs a model of transformers; we subclass it
    "Kind": ("lm_eval.tasks._index", "Kind"),  # whether a name is a task, a group or a tag
    "TaskManager": ("lm_eval.tasks", "TaskManager"),  # the registry of tasks
    "evaluate": ("lm_eval", "evaluate"),  # scores tasks
    "get_model": ("lm_eval.api.registry", "get_model"),  # the class that runs a model in vLLM
    "handle_stop_sequences": (
        "lm_eval.models.utils",
        "handle_stop_sequences",
    ),  # with the end token
    "load_yaml": ("lm_eval.tasks._yaml_loader", "load_yaml"),  # a task's file with what it includes
    "normalize_gen_kwargs": ("lm_eval.models.utils", "normalize_gen_kwargs"),  # one name per limit
    "postprocess_generated_text": ("lm_eval.models.utils", "postprocess_generated_text"),  # cuts
    "simple_parse_args_string": ("lm_eval.utils", "simple_parse_args_string"),  # reads `a=1,b=2`
    "task_module": ("lm_eval.api.task", None),  # its progress bars are silenced
}

# Attributes that we read or override: (name above, attribute) -> why
ATTRIBUTES: dict[tuple[str, str], str] = {
    ("HFLM", "_create_model"): "overridden: how a model is loaded",
    ("HFLM", "_model_call"): "overridden: progress is counted",
    ("HFLM", "_model_generate"): "overridden: thoughts, and what the limit cut",
    ("Kind", "GROUP"): "a group of tasks",
    ("Kind", "TAG"): "a tag of tasks",
    ("TaskManager", "all_tasks"): "the names of tasks, groups and tags",
    ("TaskManager", "task_index"): "the file of each task",
    ("task_module", "tqdm"): "its progress bar",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    loaded = import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
