"""
`python -m eaft`, for launchers: `torchrun -m eaft train ...`, `accelerate launch -m eaft train
...`.
"""

from eaft.cli import main

raise SystemExit(main())
