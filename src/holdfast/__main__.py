"""``python -m holdfast``: the same program as ``holdfast``."""

from holdfast.cli import main

main()
