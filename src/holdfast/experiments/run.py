"""The old name of ``holdfast.experiments.runs.training``; it goes in 0.3."""

from holdfast.experiments.runs.training import *  # noqa: F403
