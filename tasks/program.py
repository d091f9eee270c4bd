"""The Python program in a completion: blocks of code, helpers, drafts and prose told apart. Nothing
is run here."""

import ast
import builtins
import re
import textwrap
import warnings
from itertools import dropwhile, islice

from tasks.reasoning import without_reasoning

STOPS = r"\n(?=class |def |@|#|if |print\(|```)"  # where a continuation of a function ends
INDENTED = re.compile(r"(?:[ \t]*\n)*(?:\t|  )[ \t]*[^\s`~]")  # the first line of code is
OPENING = re.compile(r"(?<!\S)(`{3,}+|~{3,}+)[ \t]*(\w*+)[^`]*+$")  # a fence and its language
LANGUAGES = ("", "py", "python", "python3")  # of the fences that are read
BEGINNING = re.compile(r"(?:async def|class|def|from|import)\s|@\w|\w+\s*=")  # of a statement
FUTURE = re.compile(r"^from __future__ import (?:\([^()]*\)|[^\n(]*)\n?", re.MULTILINE)
CONSTANTS = vars(builtins).keys() - {"input"}  # what a constant may be made of
WITH_BODY = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MOST_FENCES, MOST_PARSES = 10, 50  # of one block, of one text: no text may take long


def program(example: dict) -> str:
    """Returns the Python program in a completion. An indented text goes on with the prompt's
    function. Any other text is searched for definitions, in blocks of code and around them; of two
    of one name the last counts. If none is of the function, the first block goes on with the
    prompt, else the text."""
    text, code = without_reasoning(example["raw_prediction"]), example["code"]
    entry = example["entry_point"]
    if entry and INDENTED.match(text):
        return continuation(code, text)
    if not entry:  # MBPP's layout ends with [DONE]
        text = text.split("[DONE]")[0]
    text = text.removeprefix(" ")  # chat formats have one before an answer
    parts = split_fences(text)
    pieces, names = definitions([part for part, _ in parts])
    if entry in names or (names and not entry):
        whole = "\n\n".join([with_body(code), *pieces])  # imports and helpers stand in the prompt
        return "".join(FUTURE.findall(whole)) + FUTURE.sub("", whole)
    text = next((part for part, is_block in parts if is_block), text)
    return continuation(code, text) if entry else text


def continuation(code: str, text: str) -> str:
    """Returns the prompt and the text that goes on with it, up to other functions and prose."""
    whole = code + re.split(STOPS, text, maxsplit=1)[0]
    return next((piece for piece, _ in python_in(whole) if piece.startswith(code)), whole)


def with_body(code: str) -> str:
    """Returns the prompt as a program. Its function has no body yet, unless it has a docstring."""
    if is_python(code):
        return code
    indent = re.match(r"\s*", code.rstrip().split("\n")[-1])[0]
    return f"{code.rstrip()}\n{indent} pass\n"


def split_fences(text: str) -> list[tuple[str, bool]]:
    """Returns the parts of a text, each with whether it is a block of Python. Fences are as in
    CommonMark, but words may stand before one. The first closing fence at which the block is Python
    ends it, since docstrings have fences, too. Blocks of other languages are left out."""
    parts, lines, start, i = [], text.split("\n"), 0, 0
    while i < len(lines):
        opening = OPENING.search(lines[i])
        i += 1
        if not opening:
            continue
        fence, language = opening.groups()
        parts.append(("\n".join([*lines[start : i - 1], opening.string[: opening.start()]]), False))
        closing = re.compile(rf"\s{{0,{opening.start() + 3}}}{fence[0]}{{{len(fence)},}}\s*")
        ends = (n for n in range(i, len(lines)) if closing.fullmatch(lines[n]))
        ends = list(islice(ends, MOST_FENCES)) or [len(lines)]
        end = ends[0]
        if language.lower() in LANGUAGES:
            indent = len(opening.string) - len(opening.string.lstrip())  # as in a list
            blocks = {n: unindented(lines[i:n], indent) for n in ends}
            end = next((n for n in ends if is_python(textwrap.dedent(blocks[n]))), end)
            parts.append((blocks[end], True))
        start = i = end + 1
    return [*parts, ("\n".join(lines[start:]), False)]


def unindented(lines: list[str], indent: int) -> str:
    """Returns the lines of a block without the indent of its opening fence."""
    return "\n".join(line[min(indent, len(line) - len(line.lstrip())) :] for line in lines)


def definitions(texts: list[str]) -> tuple[list[str], set[str]]:
    """Returns the pieces of Python that define names, and the names. A draft is left out: all of
    its names are defined again later. So is an example of use: it has no function or class, and it
    does more than import and set constants, or imports what another piece defines."""
    found = [piece for text in texts for piece in python_in(textwrap.dedent(text))]
    functions = {s.name for _, tree in found for s in tree.body if isinstance(s, WITH_BODY)}
    pieces, known = [], set()
    for piece, tree in reversed(found):
        defined = [names_of(statement) for statement in tree.body]
        names = set().union(*defined)
        has_function = any(isinstance(statement, WITH_BODY) for statement in tree.body)
        is_example = not has_function and (not all(defined) or names & functions)
        if is_example or names <= known:
            continue
        last = max(i for i, new in enumerate(defined) if new)
        pieces.insert(0, without_words(piece, tree.body[: last + 1]))
        known |= names
    return pieces, known


def names_of(statement: ast.stmt) -> set[str]:
    """Returns the names that a statement defines: of a function, a class, an import, a constant."""
    if isinstance(statement, WITH_BODY):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        targets = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        return targets if {name.id for name in names} - targets <= CONSTANTS else set()
    return set()


def without_words(piece: str, statements: list[ast.stmt]) -> str:
    """Returns the lines of these statements. A word alone, as `Solution`, is prose that parses."""
    words = [s for s in statements if isinstance(s, ast.Expr) and not isinstance(s.value, ast.Call)]
    left_out = {n for s in words for n in range(s.lineno, s.end_lineno + 1)}
    lines = enumerate(piece.split("\n")[: statements[-1].end_lineno], 1)
    return "\n".join(line for n, line in lines if n not in left_out)


def python_in(text: str) -> list[tuple[str, ast.Module]]:
    """Returns the pieces of a text that are Python, with their trees. A piece ends before the
    statement in which Python finds an error. The next begins at a line that looks like code."""
    found, lines = [], text.split("\n")
    end = len(lines)
    for _ in range(MOST_PARSES):
        piece = "\n".join(lines[:end])
        try:
            found.append((piece, parse(piece)))
            lines = lines[end:]
        except SyntaxError as error:
            end = min(error.lineno or 1, end) - 1
            while end > 0 and not lines[end][:1].strip():
                end -= 1
            if end > 0:
                continue
            lines = list(dropwhile(lambda line: not BEGINNING.match(line), lines[1:]))
        if not lines:
            break
        end = len(lines)
    return found


def is_python(text: str) -> bool:
    try:
        return bool(parse(text))
    except SyntaxError:
        return False


def parse(text: str) -> ast.Module:
    """Returns the tree of a program. Raises SyntaxError, also for what is too deep for Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. of "\d"
        try:
            return ast.parse(text)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(str(error)) from None
