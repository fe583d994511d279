"""holdfast show."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_run, print_table
from holdfast.cli.train import RunsOption


def show(
    name: Annotated[
        str, typer.Argument(help="A recipe, a component (its name, or package.module:Class), a study, or a run.")
    ],
    runs: RunsOption = RUNS,
) -> None:
    """Show a recipe with all its settings, a component with the meaning of each, a study, or a run's result.

    Of what a recipe or a run names from elsewhere nothing is imported; a component from elsewhere is.
    """
    with answer_for() as progress:
        import yaml

        from holdfast.component import absent
        from holdfast.experiments import find_run, recipe_names, resolve
        from holdfast.experiments.catalogue import components, settings_of
        from holdfast.experiments.studies.study import read_study, study_names
        from holdfast.foreign import no_imports

        found = components(name)
        if name in recipe_names() or name.endswith((".yaml", ".yml")):
            with no_imports():
                recipe = resolve(name)
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
            for sentence in absent(recipe):
                progress.stage(sentence)
        for component in found:
            title = f"{name} ({component.family}): {component.summary()}"
            print_table(title, ["setting", "default", "meaning"], settings_of(component))
        if name in study_names():
            print(
                yaml.safe_dump(read_study(name).model_dump(mode="json"), sort_keys=False, allow_unicode=True),
                end="",
            )
        if name in (*recipe_names(), *study_names()) or found or name.endswith((".yaml", ".yml")):
            return
        run = find_run(name, runs)
        if not run.finished:
            raise FileNotFoundError(f"{run.path} is not finished; holdfast train with its recipe goes on with it")
        if len(run.evaluations) > 1:
            names = ", ".join(one.path.name for one in run.evaluations)
            progress.stage(f"{run.path} has {len(run.evaluations)} evaluations ({names}); this is the latest")
        with no_imports():
            print_run(run)
            for sentence in absent(run.experiment):
                progress.stage(sentence)
