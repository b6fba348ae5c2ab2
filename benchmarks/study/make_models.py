"""
Write the study's base models: the real one, and the same sharpened, as safetensors in
runs/study/models.

    python benchmarks/study/make_models.py "$(python recipes/demo/find_model.py)"

`s2` is the model with its logits times 2: the weight of its last norm is scaled, so that all it has
learned and every first choice stay as they are, and only its certainty changes.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARPNESS = [1.0, 1.25, 1.5, 2.0, 3.0]


def main() -> None:
    """Write a folder for each sharpness that has none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument(
        "--sharpness",
        type=float,
        nargs="+",
        default=SHARPNESS,
        metavar="S",
        help="what logits are multiplied by",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study/models"))
    flags = parser.parse_args()
    source = {"pretrained_model_name_or_path": flags.model.parent, "gguf_file": flags.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for sharpness in flags.sharpness:
        folder = flags.output_dir / f"s{sharpness:g}"
        if folder.exists():
            continue
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model.config.__dict__.pop("quantization_config", None)  # it is not quantised any more
        model.hf_quantizer, model.is_quantized = None, False
        with torch.no_grad():
            model.model.norm.weight.mul_(sharpness)
        staging = folder.with_suffix(".tmp")
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.rename(folder)
        print(folder)


if __name__ == "__main__":
    main()
