"""`{name}` in a prompt becomes the value of the user's variable, where it is clearly one; all else comes through to the letter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

CANDIDATE = re.compile(r"\{([^\W\d]\w*+)\}")
# Where a span may begin that is not for us: an f-string (or C#'s $"), a command or an escaped character, a dollar, a script.
OPENING = re.compile(r"""(?<!\w)(?:[fF][rR]?|[rR][fF]|\$@?)(?P<quote>\"{3}|'{3}|["'])|\\(?:[A-Za-z@]+\*?|.)|\$\$?|[_^]\{""", re.DOTALL)
BRACE = re.compile(r"\\[^\n]|[{}]|\n(?P<barrier>[ \t\r]*+(?=\n|```))?")
BARRIER = re.compile(r"\n[ \t\r]*+(?=\n|```)")  # a blank line or a fence: no formula and no argument goes on beyond it
IN_STRING = {quote: re.compile(rf"\\.|\{{\{{|[{{}}\n{quote}]", re.DOTALL) for quote in "\"'"}
MATH = "align alignat array bmatrix Bmatrix cases displaymath eqnarray equation flalign gather math matrix multline pmatrix vmatrix Vmatrix"
MATH_ENVIRONMENTS = frozenset(name + star for name in MATH.split() for star in ("", "*"))


def fill(text: str, variables: Mapping[str, object]) -> str:
    """The text with each `{name}` that is clearly a variable replaced by `str(value)`, once: values are not looked through again.

    Only an identifier in single braces counts. Left alone are `{{name}}` and `${name}`, f-strings, LaTeX (formulas by pandoc's
    rules, arguments of commands, `^{n}` and `x_{i}`), and braces that hold anything else, as those of JSON and code do. A name
    that is not in `variables` stays as it is.

    >>> fill('Translate "{word}" to French as {"french": "..."}', {"word": "cat"})
    'Translate "cat" to French as {"french": "..."}'
    """
    if not any(match[1] in variables for match in CANDIDATE.finditer(text)):
        return text
    parts, done = [], 0
    for match in _clear(text):
        if match[1] in variables:
            parts += [text[done : match.start()], str(variables[match[1]])]
            done = match.end()
    return "".join([*parts, text[done:]])


def names(text: str) -> list[str]:
    """The names that `fill` would put a variable's value for, if there were one: each once, in order."""
    return list(dict.fromkeys(match[1] for match in _clear(text)))


def users_variables(ip: Any) -> dict[str, object]:
    """The variables that the user of this shell made, as `%who` sees them; not what they imported or defined to be called."""
    hidden, absent = ip.user_ns_hidden, object()
    return {
        name: value
        for name, value in ip.user_ns.items()
        if not name.startswith("_")
        and value is not hidden.get(name, absent)
        and not isinstance(value, ModuleType | type)
        and not inspect.isroutine(value)
    }


def _clear(text: str) -> Iterator[re.Match[str]]:
    """Every `{identifier}` that nothing around it claims."""
    spans, start, end = _Scan(text).spans(), 0, 0
    for match in CANDIDATE.finditer(text):
        at = match.start()
        while end <= at and (span := next(spans, None)) is not None:
            start, end = span
        before, after = text[at - 1 : at], text[match.end() : match.end() + 1]
        if not (start <= at < end or before == "$" or (before == "{" and after == "}")):
            yield match


class _Next:
    """Where a pattern occurs next, asked from positions that only grow: the text is looked through once in all."""

    def __init__(self, pattern: re.Pattern[str], text: str) -> None:
        self._found = pattern.finditer(text)
        self._none = len(text) + 1
        self._start = self._end = -1

    def __call__(self, position: int) -> tuple[int, int]:
        """Start and end of the first match that begins at or after the position; beyond the text if there is none."""
        while self._start < position:
            match = next(self._found, None)
            self._start, self._end = match.span() if match else (self._none, self._none)
        return self._start, self._end


class _Scan:
    """One walk from left to right over the spans of a text that belong to code or LaTeX, in time that grows with its length."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.templates = {match.end() for match in CANDIDATE.finditer(text)}  # where a `{name}` ends
        self.pairs, self.inline = _pairs(text)
        self.barrier = _Next(BARRIER, text)
        self.closers = {
            "$": _Next(re.compile(r"(?<=[^\s\\$])\$(?!\d)"), text),  # pandoc's rule
            "$$": _Next(re.compile(r"\$\$"), text),
            "\\(": _Next(re.compile(r"(?<!\\)\\\)"), text),
            "\\[": _Next(re.compile(r"(?<!\\)\\\]"), text),
            "[": _Next(re.compile(r"\]"), text),
            '"""': _Next(re.compile(r'(?<!\\)"""'), text),
            "'''": _Next(re.compile(r"(?<!\\)'''"), text),
        }
        self.dead: dict[str, set[int]] = {'"': set(), "'": set()}  # from here on no string ends on its line

    def spans(self) -> Iterator[tuple[int, int]]:
        """The spans in order, none inside another."""
        position = 0
        while (match := OPENING.search(self.text, position)) is not None:
            end = self._end(match)
            if end is None:
                position = match.start() + 1 if match["quote"] else match.end()
            else:
                yield match.start(), end
                position = end

    def _end(self, match: re.Match[str]) -> int | None:
        """Where the span that may begin here ends; None if none begins."""
        text, mark, start, end = self.text, match[0], match.start(), match.end()
        if (quote := match["quote"]) is not None:
            return None if text[max(start - 1, 0) : start] == quote else self._string(end, quote)  # "f" is a letter in quotes
        if mark in {"$$", "\\(", "\\["}:
            return self._closed(mark, end)
        if mark == "$":
            return self._closed(mark, end) if text[end : end + 1].strip() else None
        if mark[0] == "\\":
            return self._command(mark, end)
        return self._arguments(start) if mark == "^{" or self._has_base(start) else None

    def _closed(self, opening: str, position: int) -> int | None:
        """The end of what was opened just before the position, if it ends before the next barrier."""
        least = position + (opening[0] == "$")  # a formula in dollars is not empty
        start, end = self.closers[opening](least)
        return end if start < self.barrier(position)[0] and start <= len(self.text) else None

    def _string(self, position: int, quote: str) -> int | None:
        if len(quote) == 3:
            start, end = self.closers[quote](position)
            return end if start <= len(self.text) else None
        dead, seen = self.dead[quote], []
        while (match := IN_STRING[quote].search(self.text, position)) is not None and match.start() not in dead:
            if match[0] == quote:
                return match.end()
            if match[0] == "\n":
                break
            seen.append(match.start())
            position = self.pairs[match.start()] + 1 if match[0] == "{" and match.start() in self.inline else match.end()
        dead.update(seen)
        return None

    def _command(self, name: str, position: int) -> int | None:
        if name == "\\{":  # an escaped brace
            return position
        if not name[1].isalpha():
            accent = name[1] in "'`\"^~=." and self.pairs.get(position) == position + 2  # \"{o}, but not \"{name}\" of quoted JSON
            return position + 3 if accent else None
        end = self._arguments(position)
        if name == "\\begin" and (kind := self.text[position + 1 : self.pairs.get(position, 0)]) in MATH_ENVIRONMENTS:
            closing = f"\\end{{{kind}}}"
            start, after = self.closers.setdefault(closing, _Next(re.compile(re.escape(closing)), self.text))(position)
            return after if start <= len(self.text) else end
        return end

    def _arguments(self, start: int) -> int | None:
        """The end of the groups that stand one after the other from here: {...}, [...], _{...} and ^{...}; None if there is none."""
        position = start
        while True:
            opening = self.text[position : position + 2]
            group = position + 1 if opening in {"_{", "^{"} else position
            if opening[:1] == "[" and (closed := self._closed("[", position + 1)) is not None:
                position = closed
            elif group in self.pairs:
                position = self.pairs[group] + 1
            else:
                return position if position > start else None

    def _has_base(self, underscore: int) -> bool:
        """Whether a single character, a `)` or the end of a group stands before the underscore; not `file_{n}` or `{first}_{last}`."""
        before, base = self.text[max(underscore - 2, 0) : underscore][:-1], self.text[max(underscore - 1, 0) : underscore]
        if base == "}":
            return underscore not in self.templates
        if base.isalpha():
            return not (before.isalpha() or before == "_")
        return base == ")" or (base.isalnum() and not (before.isalnum() or before == "_"))


def _pairs(text: str) -> tuple[dict[int, int], set[int]]:
    """Each opening brace with the one that closes it before the next barrier, and those where both stand on one line."""
    pairs, inline, line = {}, set(), 0
    waiting: list[tuple[int, int]] = []
    for match in BRACE.finditer(text):
        match match[0][0]:
            case "{":
                waiting.append((match.start(), line))
            case "}" if waiting:
                opened, on = waiting.pop()
                pairs[opened] = match.start()
                if on == line:
                    inline.add(opened)
            case "\n":
                line += 1
                if match["barrier"] is not None:
                    waiting.clear()
    return pairs, inline
