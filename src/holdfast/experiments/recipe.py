"""The old name of ``holdfast.experiments.recipes.overrides``; it goes in 0.3."""

from holdfast.experiments.recipes.overrides import *  # noqa: F403
