"""
The flags of training as TRL's parser reads them, and the flags meant for `accelerate launch`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from eaft.errors import ConfigurationError, nearest
from eaft.files import read_yaml
from eaft.processes import check_place
from eaft.training.bounds import MIXTURE, MODEL, check_bounds, check_types
from eaft.training.config import EAFTConfig
from eaft.training.flags import DryRunArguments
from eaft.training.trl_internals import resolve_accelerate_config_argument, subtract_subsequence

LAUNCHED = "EAFT_LAUNCHED"  # set for the processes that accelerate starts for us


def make_parser(own: type = DryRunArguments, **settings: Any) -> TrlParser:
    """
    Return a parser of TRL's flags and ours.

    Args:
        own: a dataclass with the flags of one command.
        settings: keyword arguments of `argparse.ArgumentParser`.
    """
    parser = TrlParser(
        (ScriptArguments, EAFTConfig, ModelConfig, DatasetMixtureConfig, own),
        **{"prog": "eaft train", "usage": "eaft train [flags]", **settings},
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show the flags that most runs need")
    parser.add_argument("--help_all", "--help-all", action="help", help="show every flag")
    return parser


def parse(
    argv: list[str], parser: TrlParser | None = None, recipe_launches: bool = True
) -> tuple[list[Any], list[str], list[str]]:
    """
    Return the arguments of `train`, the flags meant for `accelerate launch`, and the other flags.

    Args:
        parser: the parser of another command that takes these flags.
        recipe_launches: whether the YAML file's settings for `accelerate launch` count too.

    Raises:
        ConfigurationError: an unknown flag, a value of the wrong type, a YAML file that cannot be
            read.
    """
    parser = parser or make_parser()
    if "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
        check_types(read_yaml(path, f"--config {path}"), parser.dataclass_types, path)
    try:
        *configs, yaml_rest, flags_rest = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        launch_args = resolve_accelerate_config_argument(
            (yaml_rest if recipe_launches else []) + flags_rest
        )
    except (OSError, ValueError, TypeError) as error:  # complaints of transformers and TRL
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(" ".join(str(error).split())) from error
    check_bounds(configs[2], MODEL)
    check_bounds(configs[3], MIXTURE)
    check_place(Path(configs[1].output_dir), "output_dir")
    known_args, unknown = launch_command_parser().parse_known_args([*launch_args, "script"])
    if flags := [flag for flag in unknown if flag.startswith("-")]:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ConfigurationError(
            f"{flags[0]} is unknown.{nearest(flags[0], known)} See {parser.prog} --help."
        )
    if known_args.training_script != "script":
        raise ConfigurationError(
            f"{known_args.training_script!r} belongs to no flag. See {parser.prog} --help."
        )
    return configs, launch_args, subtract_subsequence(argv, flags_rest)


def launch(command: str, launch_args: list[str], command_args: list[str]) -> bool:
    """
    Run a command through `accelerate launch` if flags or several GPUs ask for it; return whether
    that was done.
    """
    launched = "RANK" in os.environ or LAUNCHED in os.environ
    if launched or not (launch_args or torch.cuda.device_count() > 1):
        return False
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(
            launch_command_parser().parse_args([*launch_args, "-m", "eaft", command, *command_args])
        )
    except subprocess.CalledProcessError as error:  # it has said why
        raise SystemExit(error.returncode) from None
    return True
