"""Code out of answers in chat: whatever the prose around it, what parses and defines the function is taken."""

import time

import pytest

from puna.evaluate.answers import code_of, defines, preamble

CODE = "def add(x, y):\n    return x + y\n"

ANSWERS = {
    "a fence": f"Sure!\n\n```python\n{CODE}```\n\nIt adds.",
    "a fence without a language": f"```\n{CODE}```",
    "a fence that is never closed": f"Here:\n```python\n{CODE}",
    "tildes": f"~~~py\n{CODE}~~~",
    "an indented fence": "1. Do this:\n   ```python\n   def add(x, y):\n       return x + y\n   ```\n",
    "Windows line ends": f"```python\r\n{CODE}```".replace("\n", "\r\n").replace("\r\r", "\r"),
    "the tags of Code Llama's prompt": f"[PYTHON]\n{CODE}[/PYTHON] That is it.",
    "nothing but code": CODE,
    "prose without fences": f"The function you want is\n\n{CODE}\nwhich adds two numbers.",
    "usage in a fence of its own before": f"Use it so:\n```python\nadd(1, 2)\n```\nThe code:\n```python\n{CODE}```",
    "another function before": f"```python\ndef sub(x, y):\n    return x - y\n```\n```python\n{CODE}```",
    "a fence that is not Python before": f"```text\nx plus y\n```\n```python\n{CODE}```",
    "the question repeated with its fence": f"[INST] Write add. [/INST]\n```python\n{CODE}```",
    "a lambda": "```python\nadd = lambda x, y: x + y\n```",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_function_is_found(answer: str) -> None:
    code = code_of(ANSWERS[answer], "add")
    assert code is not None
    names: dict = {}
    exec(code, names)
    assert names["add"](2, 3) == 5


def test_imports_and_helpers_come_along() -> None:
    answer = f"It needs\n\nimport math\n\ndef twice(x):\n    return 2 * x\n\n{CODE}\nAll done."
    code = code_of(answer, "add")
    assert code is not None
    assert "import math" in code
    assert "def twice" in code
    assert "All done" not in code


def test_a_helper_in_one_fence_and_the_function_in_another_are_put_together_only_where_needed() -> None:
    answer = f"```python\nimport math\n```\nand\n```python\n{CODE}```"
    assert code_of(answer, "add") == CODE


HELPERS = """First what it needs:
```python
import math
from functools import partial as part
@part(part, lambda function, x: 2 * function(x))
def twice(x):
    return rounded(x)
```
```python
from math import *
def rounded(x):
    return math.floor(x)
```
Then:
```python
def add(x, y):
    return twice(x) - x + y
```
So `add(2, 3)` is 5:
```python
from solution import add
x = add(2, 3)
print(x)
```
"""


def test_what_the_function_uses_of_other_fences_comes_along_and_nothing_else() -> None:
    code = code_of(HELPERS, "add")
    names: dict = {}
    exec(code or "", names)
    assert names["add"](2, 3) == 5
    assert "print" not in (code or "")
    assert "from math" not in (code or "")


@pytest.mark.parametrize("body", ['"""Adds them."""', "pass", '"""Adds them."""\n    ...'])
def test_a_signature_that_an_answer_repeats_is_not_the_function(body: str) -> None:
    stub = f"```python\ndef add(x, y):\n    {body}\n```"
    assert code_of(f"You gave me:\n{stub}\nHere it is:\n```python\n{CODE}```", "add") == CODE
    assert "def add" in (code_of(stub, "add") or "")


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\ndef add(x, y:\n```", "def sub(x): return x"])
def test_where_there_is_no_such_function_there_is_no_code(answer: str) -> None:
    assert code_of(answer, "add") is None


def test_long_prose_takes_no_time() -> None:
    answer = "def of a thing\n" + "and so on, said the\n" * 5000 + CODE
    started = time.perf_counter()
    code_of(answer, "add")
    assert time.perf_counter() - started < 2


def test_a_name_counts_at_the_top_alone() -> None:
    assert defines("class add: pass", "add")
    assert not defines("class A:\n    def add(self): pass", "add")
    assert not defines("if x:", "add")


def test_the_preamble_is_what_stands_before_the_function() -> None:
    prompt = (
        "from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: List) -> int:\n    '''def f(y)'''\n"
    )
    assert preamble(prompt, "f") == "from typing import List\n\n\ndef helper(x):\n    return x\n\n\n"
    assert preamble("def f(x):\n", "f") == ""
    assert preamble("x = (\ndef f(x):\n", "f") == ""
