"""Rules: any Python function as a scorer, named by its dotted path; and scores by who wrote a response.

A rule is called once per prompt with all of its responses and returns one number for each, higher is better. It sees
the other columns of the prompt's row (a ground truth, tests, metadata) as keywords: those that it names, or all with
`**columns`. TRL's reward functions are rules as well: one that names `completions` gets lists as TRL gives them::

    def rule(prompt: str, responses: list[str], answer: str, **columns) -> list[float | None]: ...
    def rule(prompts: list, completions: list, **columns: list) -> list[float | None]: ...

Lists, tuples, generators, NumPy arrays and tensors of one dimension are read; None stands for a response that
the rule does not score. Naming a rule runs the code of its module, as importing it would. With `processes` or `timeout`
it runs in worker processes: several groups are scored at a time, and a rule that never ends costs its group alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import itertools
import math
import multiprocessing
import numbers
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rrhf_peft.data import transcript
from rrhf_peft.records import LARGEST_SCORE, Message, RankedGroup, UserError
from rrhf_peft.score.combine import GroupScores, columns_of

if TYPE_CHECKING:
    from rrhf_peft.recipe import Recipe
    from rrhf_peft.recipe.stages import RuleScorer, SourceScorer

#: (prompt, its responses) -> one score per response.
Rule = Callable[[str, list[str]], list[float]]

_SIGNATURE = "a rule is a function (prompt: str, responses: list[str], **columns) -> list[float]"


class RuleScores:
    """A rule over candidates; a response that it gives None, or whose group took too long, has no score."""

    def __init__(self, section: RuleScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        self.section, self.function = section, import_rule(section.function)
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None
        if section.processes > 1 or section.timeout is not None:
            self.pool = concurrent.futures.ProcessPoolExecutor(section.processes, multiprocessing.get_context("spawn"))

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """What the rule says."""
        name, seconds = self.section.function, self.section.timeout
        rows = [(group.prompt, group.responses, columns_of(group), group.index) for group in groups]
        if self.pool is None:
            given: list[list[float | None] | None] = [rule_scores(name, self.function, *row) for row in rows]
        else:
            try:
                given = list(self.pool.map(functools.partial(_scored_by_worker, name, seconds), rows))
            except concurrent.futures.BrokenExecutor:
                raise UserError(
                    f"rule {name!r}: its process ended in the middle of a call. Correct the rule, which must not exit, "
                    "crash or outgrow the memory. What was scored before is kept."
                ) from None
        late = f"the rule took more than {seconds} seconds"
        scored = []
        for group, scores in zip(groups, given, strict=True):
            values: list[float | None] = [None] * len(group.responses) if scores is None else scores
            why = late if scores is None else "the rule gives no score"
            scored.append(GroupScores(values, {number: why for number, score in enumerate(values) if score is None}))
        return scored


def _scored_by_worker(name: str, seconds: float | None, row: tuple[Any, ...]) -> list[float | None] | None:
    """In a worker process: the rule's scores, None where it takes too long; on systems that have alarms."""

    def stop(signum: int, frame: Any) -> None:
        raise _TooLateError

    if seconds is not None and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return rule_scores(name, import_rule(name), *row)
    except _TooLateError:
        return None
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


class _TooLateError(BaseException):
    """No rule that catches every Exception catches this one."""


class SourceScores:
    """Who wrote a candidate, as SPIN (arXiv 2401.01335) ranks: a human's answer above the policy's own.

    Raises:
        UserError: a source without a score; told before anything is written.
    """

    def __init__(self, section: SourceScorer, recipe: Recipe, seed: int, groups: Sequence[RankedGroup]) -> None:
        sources = dict.fromkeys(source for group in groups for source in group.sources)
        self.scores = {source: source_score(source, section.scores) for source in sources}

    def score(self, groups: Sequence[RankedGroup]) -> list[GroupScores]:
        """What the patterns say; every response gets a score."""
        return [GroupScores([self.scores[source] for source in group.sources]) for group in groups]


def source_score(source: str, scores: Mapping[str, float]) -> float:
    """The score of the first pattern that matches a source name.

    Args:
        source: name from the sources column, such as ``top_p:round-1``.
        scores: shell-style pattern (``*``, ``?``, ``[ab]``; upper and lower case differ) -> score.

    Raises:
        UserError: no pattern matches.
    """
    for pattern, score in scores.items():
        if fnmatchcase(source, pattern):
            return score
    raise UserError(
        f"scoring.scorer.scores: no pattern matches the source {source!r} (there are: {', '.join(scores)}). Add one "
        'for it, or end the list with "*" and the score of all others.'
    )


def load_rule(name: str) -> Rule:
    """The rule called ``package.module:function``, checked to return a number for every response.

    Raises:
        UserError: no such module or function, or it is no function. The returned rule raises it too, when it
            fails or when the scores are not one finite number per response.
    """
    function = import_rule(name)

    def checked(prompt: str, responses: list[str]) -> list[float]:
        scores: list[float] = []
        for number, score in enumerate(rule_scores(name, function, prompt, responses)):
            if score is None:
                raise UserError(f"{_where(name, prompt)}: the score of response {number} is None. Return a number.")
            scores.append(score)
        return scores

    return checked


def import_rule(name: str) -> Callable[..., Any]:
    """Import the function called ``package.module:function``.

    Modules are also looked for in the working directory, after everywhere else, so that a rule can lie
    beside its recipe without hiding an installed package.

    Raises:
        UserError: no such module or function, or it is no function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and function_name and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"rule {name!r}: write package.module:function, for example rrhf_peft.score:vader.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            problem = (
                f"Python finds no module {missing!r}{_did_you_mean(missing)}. Check the spelling, and that it is "
                "installed, on PYTHONPATH, or in this folder"
            )
        else:
            problem = f"{module_name} needs the module {missing!r}, which is not installed. Install it"
        raise UserError(f"rule {name!r}: {problem}.") from None
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"rule {name!r}: importing {module_name} fails with {_described(error)}. Correct that module."
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"{_SIGNATURE}."
        raise UserError(f"rule {name!r}: {module_name} has no {function_name!r}; {hint}")
    if not callable(function):
        raise UserError(f"rule {name!r}: {function_name} is a {type(function).__name__}, and {_SIGNATURE}.")
    return function


def rule_scores(
    name: str,
    function: Callable[..., Any],
    prompt: str | list[Message],
    responses: Sequence[str],
    columns: Mapping[str, Any] | None = None,
    group: int | None = None,
) -> list[float | None]:
    """Call the rule for one prompt, and read what it returns.

    Raises:
        UserError: the rule fails, or returns anything else than a finite number or None for each response;
            names the rule, the group (its position in the input) and the prompt.
    """
    text = prompt if isinstance(prompt, str) else transcript(prompt)
    where = _where(name, text, group)
    try:
        returned = _called(function, prompt, text, responses, columns or {}, where)
        if hasattr(returned, "tolist"):  # NumPy arrays and tensors
            returned = returned.tolist()
        if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
            raise UserError(f"{where}: it returned {_kind(returned)} ({_shortened(repr(returned))}), and {_SIGNATURE}.")
        values = list(itertools.islice(returned, len(responses) + 1))  # generators run here, and may never end
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{where}: it fails with {_described(error)}. Correct the rule; {_SIGNATURE}. What was scored before is "
            "kept."
        ) from error
    if len(values) != len(responses):
        number = f"more than {len(responses)}" if len(values) > len(responses) else str(len(values))
        with contextlib.suppress(TypeError):
            number = str(len(returned))  # type: ignore[arg-type]
        raise UserError(
            f"{where}: it returned {number} scores for {len(responses)} responses. Return one for each, in order."
        )
    return [_number(value, f"{where}: the score of response {i}", responses[i]) for i, value in enumerate(values)]


def _called(
    function: Callable[..., Any],
    prompt: str | list[Message],
    text: str,
    responses: Sequence[str],
    columns: Mapping[str, Any],
    where: str,
) -> Any:
    """The rule's own answer, by the signature that it has."""
    parameters = _parameters(function)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in columns.items() if takes_all or name in parameters}
    is_trl = "completions" in parameters
    first = ["prompts", "completions"] if is_trl else list(parameters)[:2]  # a column may bear such a name
    for name, parameter in parameters.items():
        variable = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if name not in given and name not in first and parameter.default is inspect.Parameter.empty and not variable:
            raise UserError(f"{where} needs the column {name}, which its row does not have. Add it, or give a default.")
    if not is_trl:
        return function(text, list(responses), **{name: given[name] for name in given if name not in first})
    k = len(responses)
    chat: list[Any] = [[{"role": "assistant", "content": response}] for response in responses]
    given = {name: [value] * k for name, value in given.items()}
    given["completions"] = list(responses) if isinstance(prompt, str) else chat
    if takes_all or "prompts" in parameters:
        given["prompts"] = [prompt] * k
    return function(**given)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function written in C nobody knows
        return {}


def _number(value: Any, where: str, response: str) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):  # a NumPy scalar or a tensor of one element
        with contextlib.suppress(Exception):
            value = value.item()
    if not isinstance(value, (numbers.Real, Decimal)):
        raise UserError(f"{where} is {_kind(value)} ({_shortened(repr(value))}), and {_SIGNATURE}.")
    try:
        score = float(value)
    except (OverflowError, ValueError):
        score = math.inf
    if not abs(score) <= LARGEST_SCORE:  # NaN compares false
        raise UserError(
            f"{where} is {score}: {_shortened(response)}. Return a finite number, at most {LARGEST_SCORE:g} in size, "
            "for every text, empty ones included."
        )
    return score


def rule_source(name: str) -> str:
    """A fingerprint of the rule's code: its module's file, and of the modules that it uses those in the same folder.

    Modules of other folders are not looked into: which version is installed is for the user to keep.
    """
    function = import_rule(name)
    names = (name.partition(":")[0], getattr(function, "__module__", None) or "")
    todo = [module for module in map(sys.modules.get, names) if module is not None]
    folders = {Path(module.__file__).parent for module in todo if module.__file__}
    digests: dict[Path, str] = {}
    while todo:
        module = todo.pop()
        file = Path(getattr(module, "__file__", None) or "")
        if file.parent not in folders or file in digests:
            continue
        digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        for value in vars(module).values():
            used = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
            todo += [used] if used is not None else []
    return hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()


def vader(prompt: str, responses: list[str]) -> list[float]:
    """VADER sentiment of each response, a rule that is shipped: the compound, between -1 and 1.

    Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
    The prompt is not judged.

    Raises:
        UserError: vaderSentiment is not installed; it comes with the extra `vader`.
    """
    analyzer = _vader_analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise UserError(
            "The rule rrhf_peft.score:vader needs a package that is not installed: pip install 'rrhf-peft[vader]'."
        ) from None
    return SentimentIntensityAnalyzer()


def math_answer(prompt: str, responses: list[str], answer: Any, **columns: Any) -> list[float]:
    """1 for each response whose final answer equals the column `answer`, else 0; a rule that is shipped.

    math-verify (https://github.com/huggingface/Math-Verify) finds the answer, the last one in a box or else the last
    number or formula, and compares values: 1/2 equals 0.5. Of an `answer` with its derivation, as GSM8K has it, what
    stands behind ``####`` counts. Set a `timeout`: a response may be a formula that no computer algebra finishes.

    Raises:
        UserError: math-verify is not installed, or the ground truth holds no answer.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        raise UserError(
            "The rule rrhf_peft.score:math_answer needs a package that is not installed: pip install 'rrhf-peft[math]'."
        ) from None
    text = str(answer).rpartition("####")[2].strip().replace(",", "")
    # The package's own alarms would put off the one that limits the rule.
    truth = parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)
    if not truth:
        raise UserError(f"the column answer holds no number or formula: {_shortened(str(answer))}. Correct that row.")
    given = [parse(response, parsing_timeout=None) for response in responses]
    return [float(verify(truth, item, timeout_seconds=None)) for item in given]


def _where(name: str, prompt: str, group: int | None = None) -> str:
    return f"rule {name!r}{'' if group is None else f', group {group} (from 0)'}, prompt {_shortened(prompt)}"


def _did_you_mean(module: str) -> str:
    """A module whose name is near, among those beside it."""
    parent, _, last = module.rpartition(".")
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    near = difflib.get_close_matches(last, [info.name for info in pkgutil.iter_modules(path)], n=1)
    return f"; did you mean {f'{parent}.{near[0]}' if parent else near[0]!r}?" if near else ""


def _described(error: BaseException) -> str:
    """What went wrong, and in which line of whose file."""
    if isinstance(error, SystemExit):
        text = f"a call of sys.exit({'' if error.code is None else repr(error.code)})"
    else:
        text = f"{type(error).__name__}: {_shortened(str(error), 300)[1:-1]}"
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names: dict[type, str] = {str: "text", dict: "a dictionary", set: "a set, which has no order", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shortened(text: str, length: int = 60) -> str:
    text = " ".join(text[: 20 * length].split())
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")
