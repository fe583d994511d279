"""docs/attacks.md: its example runs and shows what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from holdfast.attacks import Attack

PAGE = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text("utf-8")


def test_a_quantising_defence_stands_without_a_gradient_and_falls_with_one() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/attacks.md", "exec"), names)
    without, passing = names["found"][False], names["found"][True]
    assert without["standard"] == passing["standard"] > 0.85
    assert without["attacked"]["pgd"] > 0.5
    assert passing["attacked"]["pgd"] < 0.1
    assert any("gradient of the cross-entropy is exactly zero" in text for text in without["warnings"])
    assert not any("zero" in text for text in passing["warnings"])


@pytest.mark.parametrize("text", re.findall(r"`?\{(name: .*?)\}", PAGE))
def test_every_attack_of_the_page_is_one(text: str) -> None:
    assert Attack.parse(dict(part.split(": ") for part in text.split(", ")))
