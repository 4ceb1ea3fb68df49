"""Rules: any Python function as a scorer, named by its dotted path.

A rule is called once per prompt with all of its responses and returns one finite number for each,
higher is better::

    def rule(prompt: str, responses: list[str]) -> list[float]: ...

Naming a rule runs the code of its module, as importing it would.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable

from rrhf_peft.records import UserError

#: (prompt, its responses) -> one score per response.
Rule = Callable[[str, list[str]], list[float]]

_SIGNATURE = "a rule is a function (prompt: str, responses: list[str]) -> list[float]"


def load_rule(name: str) -> Rule:
    """Import the rule called ``package.module:function``, and check what it returns from then on.

    Modules are also looked for in the working directory, after everywhere else, so that a rule can lie
    beside its recipe without hiding an installed package.

    Raises:
        UserError: no such module or function, or it is no function. The returned rule raises it too, when
            the scores are not one finite number per response.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"rule {name!r}: write package.module:function, for example rrhf_peft.score:vader.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            problem = (
                f"Python finds no module {missing!r}. Check the spelling, and that it is installed, on PYTHONPATH, "
                "or in this folder"
            )
        else:
            problem = f"{module_name} needs the module {missing!r}, which is not installed. Install it"
        raise UserError(f"rule {name!r}: {problem}.") from None
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"rule {name!r}: importing {module_name} fails with {type(error).__name__}: {error}. Mend that module."
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"{_SIGNATURE}."
        raise UserError(f"rule {name!r}: {module_name} has no {function_name!r}; {hint}")
    if not callable(function):
        raise UserError(f"rule {name!r}: {function_name} is a {type(function).__name__}, and {_SIGNATURE}.")

    def checked(prompt: str, responses: list[str]) -> list[float]:
        return _checked_scores(name, prompt, responses, function(prompt, responses))

    return checked


def _checked_scores(name: str, prompt: str, responses: list[str], returned: object) -> list[float]:
    where = f"rule {name!r}, prompt {_shortened(prompt)}"
    try:
        scores = [float(score) for score in returned]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise UserError(f"{where}: it returned {_shortened(repr(returned))}, and {_SIGNATURE}.") from None
    if len(scores) != len(responses):
        raise UserError(
            f"{where}: it returned {len(scores)} scores for {len(responses)} responses. Return one for each, in order."
        )
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"{where}: the score of response {place} is {score}: {_shortened(responses[place])}. Return a finite "
                "number for every text, empty ones included."
            )
    return scores


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
