"""The old name of ``holdfast.experiments.records.defences``; it goes in 0.3."""

from holdfast.experiments.records.defences import *  # noqa: F403
