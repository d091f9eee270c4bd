"""The Python program in a completion: blocks of code, helpers, drafts and prose told apart. Nothing
is run here."""

import ast
import builtins
import re
import textwrap
import warnings
from itertools import dropwhile, islice
from typing import NamedTuple

from tasks.reasoning import answer_in

STOPS = r"\n(?=class |def |@|#|if |print\(|```)"  # a continuation of a function ends here
INDENTED = re.compile(r"(?:[ \t]*\n)*(?:\t|  )[ \t]*[^\s`~]")  # a text whose first line is
OPENING = re.compile(r"(?<!\S)(`{3,}+|~{3,}+)[ \t]*(\w*+)[^`]*+$")  # a fence and its language
LANGUAGES = ("", "py", "python", "python3")  # fences of these languages are read
BEGINNING = re.compile(r"(?:async def|class|def|from|import)\s|@\w|\w+\s*=")  # a statement's
FUTURE = re.compile(r"^from __future__ import (?:\([^()]*\)|[^\n(]*)\n?", re.MULTILINE)
IMPORT, DATA, CODE = range(3)  # kinds of definitions; of one name the highest counts
WITH_BODY = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ACTIONS = ast.Expr | ast.AugAssign | ast.For | ast.While  # statements that define nothing
# So many closing fences are tried for a block, and so many pieces of a text are parsed: otherwise
# some texts would take minutes.
MOST_FENCES, MOST_PARSES = 10, 50


def program(example: dict) -> str:
    """Returns the Python program in a completion. An indented text goes on with the prompt's
    function. Any other text is searched for definitions, in blocks of code and around them. If no
    definition has the function's name, the first block is appended to the prompt; without a block,
    the text is."""
    text, code = answer_in(example), example["code"]
    entry = example["entry_point"]
    if entry and INDENTED.match(text):
        return continuation(code, text)
    if not entry:  # MBPP's layout ends with [DONE]
        text = text.split("[DONE]")[0]
    text = text.removeprefix(" ")  # chat formats have one before an answer
    parts = split_fences(text)
    pieces = [piece for part, _ in parts for piece in python_in(textwrap.dedent(part))]
    wanted = {entry} if entry else set(re.findall(r"\w+", example["test"]))
    lines, names = needed(pieces, wanted)
    if names & wanted:
        whole = "\n".join([with_body(code), *lines])  # imports and helpers stand in the prompt
        return "".join(FUTURE.findall(whole)) + FUTURE.sub("", whole)
    text = next((part for part, is_block in parts if is_block), text)
    return continuation(code, text) if entry else text


def continuation(code: str, text: str) -> str:
    """Returns the prompt and the text that goes on with it, up to other statements and prose."""
    whole = code + re.split(STOPS, text, maxsplit=1)[0]
    for piece, tree in python_in(whole):
        begun = [node for node in tree.body if node.lineno <= len(code.splitlines())]
        if piece.startswith(code) and begun:
            return "\n".join([*piece.split("\n")[: begun[-1].end_lineno], ""])
    return whole


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


class Statement(NamedTuple):
    """A statement at the top level of a piece of Python."""

    lines: list[str]
    defines: set[str]
    needs: set[str]  # names that it takes from outside
    kind: int  # IMPORT, DATA or CODE


def read_statement(node: ast.stmt, lines: list[str]) -> Statement:
    """Returns a statement of a piece whose lines are `lines`."""
    stored, loaded, outer = set(), set(), set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            (loaded if isinstance(n.ctx, ast.Load) else stored).add(n.id)
        elif isinstance(n, ast.arg):
            stored.add(n.arg)
        elif isinstance(n, ast.Global):
            outer |= set(n.names)
        elif isinstance(n, WITH_BODY):
            stored.add(n.name)
        elif isinstance(n, ast.Import | ast.ImportFrom):
            stored |= {alias.asname or alias.name.split(".")[0] for alias in n.names}
    defines, kind = stored, CODE
    if isinstance(node, WITH_BODY):
        defines = {node.name}
    elif isinstance(node, ast.Import | ast.ImportFrom):
        kind = IMPORT
    elif isinstance(node, ACTIONS) or "__name__" in loaded:
        defines = set()
    else:
        defines = stored - vars(builtins).keys()  # sum = 0 is an example's
        if not loaded and not any(isinstance(n, ast.Lambda) for n in ast.walk(node)):
            kind = DATA
    first = min(n.lineno for n in (node, *getattr(node, "decorator_list", [])))
    needs = (loaded - stored | outer) - vars(builtins).keys()
    return Statement(lines[first - 1 : node.end_lineno], defines, needs, kind)


def needed(pieces: list[tuple[str, ast.Module]], wanted: set[str]) -> tuple[list[str], set[str]]:
    """Returns the statements that define the wanted names and what these need, and all names that
    they define. Of several definitions of a name the last one of the highest kind counts: an
    example of use imports the answer, or shows a value of its name. Imports and other statements,
    as sys.setrecursionlimit(), count if they stand before such a definition in their piece, and
    need nothing else."""
    found = [[read_statement(n, piece.split("\n")) for n in tree.body] for piece, tree in pieces]
    last: dict[str, tuple[int, int]] = {}
    for kind in (IMPORT, DATA, CODE):
        for i, statements in enumerate(found):
            for k, statement in enumerate(statements):
                if statement.kind == kind:
                    last |= dict.fromkeys(statement.defines, (i, k))
    kept, names = set(), [name for name in wanted if name in last]
    while names:
        place = last[names.pop()]
        if place not in kept:
            kept.add(place)
            needs = found[place[0]][place[1]].needs
            names += [name for name in needs if name in last]
    lines, known = [], set()
    for i, statements in enumerate(found):
        end = max((k for j, k in kept if j == i), default=-1)
        for k, statement in enumerate(statements[: end + 1]):
            is_action = not statement.defines and statement.needs and statement.needs <= known
            kinds = {found[j][m].kind for j, m in map(last.get, statement.defines)}
            if (i, k) in kept or is_action or kinds == {IMPORT}:
                lines += statement.lines
                known |= statement.defines
    return lines, known


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
