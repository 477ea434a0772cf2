"""The examples of docs/clients.md against a real vLLM."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import KEY, ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXAMPLES = re.findall(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```",
    (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


def test_documentation_has_an_example_for_each_sdk() -> None:
    assert {"openai", "anthropic", "litellm", "langchain-openai", "openai-agents"} <= {name for name, _ in EXAMPLES}


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_documented_example_runs(served: Served, litellm: Any, name: str, code: str) -> None:
    assert "http://127.0.0.1:8100" in code
    code = code.replace("http://127.0.0.1:8100", served.base).replace("<key>", KEY)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, f"docs/clients.md: {name}", "exec"), {"__name__": "__main__"})
    assert output.getvalue().strip()
