"""From an answer to Markdown: LaTeX tables become Markdown or HTML tables, and LaTeX math gets Markdown's signs.

The models write tables as LaTeX, because it has merged cells. A table without merged cells and line breaks becomes a
Markdown table; any other becomes HTML, which Markdown may contain. Text outside of tables and math stays as it is.
A table that ends before its `\\end{tabular}`, as in an answer that was cut off, keeps the rows that it has.
"""

import html
import re
from dataclasses import dataclass
from typing import NamedTuple

_BEGIN = re.compile(r"\\begin\{(tabular\*|tabularx|tabulary|tabular|longtable)\}")
_MARK = re.compile(r"\\(begin|end)\{(?:tabular\*|tabularx|tabulary|tabular|longtable)\}")
_INNER = re.compile(r"\\(begin|end)\{")
_NEW_ROW = re.compile(r"\\\\\*?(?:[ \t]*\[-?[\d.]+ ?\w{2}\])?")
_DISPLAY = ("equation", "equation*", "displaymath")  # one formula; others, such as align, stay LaTeX inside of $$
_FORMULAS = re.compile(
    r"\\begin\{(equation\*?|displaymath|align\*?|gather\*?|multline\*?)\}(.*?)\\end\{\1\}"
    r"|\\\[(.*?)\\\]|\\\((.*?)\\\)",
    re.DOTALL,
)
# Around a table: the float, whose caption stays.
_FLOAT = re.compile(r"\\(?:begin\{table\*?\}(?:\[[^\]\n]*\])?|end\{table\*?\}|centering\b|label\{[^{}\n]*\})[ \t]*\n?")
_CAPTION = re.compile(r"\\caption\*?(?=\{)")
_RULES = re.compile(
    r"\\(?:hline|toprule|midrule|bottomrule|endhead|endfirsthead|endfoot|endlastfoot)\b(?:\[[^\]]*\])?"
    r"|\\(?:cline|cmidrule)\b(?:\[[^\]]*\])?(?:\([^)]*\))?\{[^{}]*\}"
)
_STYLES = {
    "textbf": ("**", "**"), "mathbf": ("**", "**"), "textit": ("*", "*"), "emph": ("*", "*"), "texttt": ("`", "`"),
    "textsuperscript": ("<sup>", "</sup>"), "textsubscript": ("<sub>", "</sub>"), "underline": ("<u>", "</u>"),
    "text": ("", ""), "textrm": ("", ""), "textsf": ("", ""), "mbox": ("", ""), "makecell": ("", ""),
}  # fmt: skip
_HTML_STYLES = {"**": ("<b>", "</b>"), "*": ("<i>", "</i>"), "`": ("<code>", "</code>")}
_SYMBOLS = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "ldots": "...", "dots": "...",
            "textdegree": "°", "texteuro": "€", "euro": "€", "pounds": "£", "quad": " ", "qquad": " "}  # fmt: skip
_NAME = re.compile(r"\\([A-Za-z]+)\*?")
_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)", re.DOTALL)
MAX_DEPTH = 20  # of styles within styles; deeper ones stay LaTeX
MAX_SPAN = 1000  # a table cell cannot span more; HTML has the same limit for columns


class Cell(NamedTuple):
    """A cell of a table: its LaTeX, and over how many rows and columns it goes."""

    text: str
    rows: int = 1
    columns: int = 1


@dataclass
class Table:
    """The rows of a table, each a list of cells. A place that a cell from above covers has no cell."""

    rows: list[list[Cell]]

    @property
    def is_plain(self) -> bool:
        """Whether Markdown can write the table: no merged cells, and no line breaks within one."""
        cells = [cell for row in self.rows for cell in row]
        return all(cell.rows == cell.columns == 1 and "\\\\" not in cell.text for cell in cells)


def to_markdown(answer: str) -> str:
    r"""Return an answer as Markdown.

    Args:
        answer: Markdown with LaTeX tables (`tabular`, `longtable`, ...) and LaTeX math (`\( \)`, `\[ \]`, `equation`,
            `align`, ...) in it, or plain text.

    Returns:
        the same text with tables in Markdown or HTML, and math between `$` or `$$`.
    """
    parts, place = [], 0
    while found := _BEGIN.search(answer, place):
        parts.append(_outside(answer[place : found.start()]))
        body, place = _environment(answer, found)
        table = read_table(body)
        if table.rows:
            parts.append(f"\n\n{write_markdown(table) if table.is_plain else write_html(table)}\n\n")
    parts.append(_outside(answer[place:]))
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip("\n")


def _outside(text: str) -> str:
    """Write what lies between tables: math, and what a float has around its table."""
    text = _FLOAT.sub("", text)
    pieces, place = [], 0
    while found := _CAPTION.search(text, place):
        caption, end = _group(text, found.end())
        pieces += [text[place : found.start()], f"\n{plain_text(caption)}\n"]
        place = end
    return _FORMULAS.sub(_formula, "".join(pieces) + text[place:])


def _formula(found: re.Match) -> str:
    environment, body, display, inline = found.groups()
    if inline is not None:
        return f"${inline.strip()}$"
    if environment is not None and environment not in _DISPLAY:
        name = {"align": "aligned", "gather": "gathered", "multline": "aligned"}[environment.rstrip("*")]
        return f"\n\n$$\n\\begin{{{name}}}{body}\\end{{{name}}}\n$$\n\n"
    return f"\n\n$$\n{(display if environment is None else body).strip()}\n$$\n\n"


def _environment(text: str, begin: re.Match) -> tuple[str, int]:
    """Return what stands in a table's environment after its column format, and where the text goes on.

    Tables within a cell belong to the body. Without an end, the body goes to the end of the text.
    """
    name, place = begin.group(1), begin.end()
    if place < len(text) and text[place] == "[":
        place = text.find("]", place) + 1 or place
    for _ in range(2 if name in ("tabular*", "tabularx", "tabulary") else 1):  # a width, and the columns
        if place < len(text) and text[place] == "{":
            _, place = _group(text, place)
    depth, start = 1, place
    for mark in _MARK.finditer(text, place):
        depth += 1 if mark.group(1) == "begin" else -1
        if depth == 0:
            return text[start : mark.start()], mark.end()
    return text[start:], len(text)


def _group(text: str, place: int) -> tuple[str, int]:
    """Return what stands in the braces that open at `place`, and the place behind them; an open one goes to the end."""
    if place >= len(text) or text[place] != "{":
        return text[place : place + 1], place + 1
    depth, at = 0, place
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        at += 1
        if depth == 0:
            return text[place + 1 : at - 1], at
    return text[place + 1 :], len(text)


def _split(text: str) -> list[list[str]]:
    """Split the body of a table at `\\\\` into rows, and these at `&` into cells; not within braces or tables."""
    rows: list[list[str]] = [[""]]
    place = depth = 0
    while place < len(text):
        two = text[place : place + 2]
        inner = _INNER.match(text, place)
        if inner:
            depth += 1 if inner.group(1) == "begin" else -1
            piece = inner.group()
            depth += 1  # of the brace that was just opened
        elif two == "\\\\" and depth <= 0:
            found = _NEW_ROW.match(text, place)
            rows.append([""])
            place = found.end()
            continue
        elif text[place] == "\\":
            piece = two
        elif text[place] == "&" and depth <= 0:
            rows[-1].append("")
            place += 1
            continue
        else:
            piece = text[place]
            depth += (piece == "{") - (piece == "}")
        rows[-1][-1] += piece
        place += len(piece)
    return rows


def read_table(body: str) -> Table:
    """Read what stands between a table's column format and its end."""
    rows, covered = [], {}  # how many more rows each column is covered by a cell from above
    for texts in _split(body):
        texts = [_RULES.sub("", text).strip() for text in texts]
        if texts in ([""], []):
            continue
        row, column = [], 0
        for text in texts:
            cell = _read_cell(text)
            places = range(column, column + cell.columns)
            is_covered = any(covered.get(place, 0) for place in places)
            for place in places:
                covered[place] = covered[place] - 1 if covered.get(place, 0) else cell.rows - 1
            column += cell.columns
            if not (is_covered and not cell.text):  # LaTeX leaves the places under a merged cell empty
                row.append(cell)
        rows.append(row)
    return Table(rows)


def _read_cell(text: str) -> Cell:
    """Take `\\multicolumn` and `\\multirow` off a cell, in either order."""
    rows = columns = 1
    while found := re.match(r"\\multi(column|row)(?:\[[^\]]*\])?(?=\{)", text):
        number, place = _group(text, found.end())
        if place < len(text) and text[place] == "[":
            place = text.find("]", place) + 1 or place
        _, place = _group(text, place)  # alignment or width
        content, place = _group(text, place)
        span = min(int(number), MAX_SPAN) if number.strip().isdecimal() and int(number) > 0 else 1
        rows, columns = (rows, span) if found.group(1) == "column" else (span, columns)
        text = (content + text[place:]).strip()
    return Cell(text, rows, columns)


def plain_text(text: str, as_html: bool = False, depth: int = 0) -> str:
    """Return the text of a cell: LaTeX's escapes undone, styles in Markdown or HTML; math stays between `$`."""
    out, place = [], 0
    while place < len(text):
        character = text[place]
        if math := _MATH.match(text, place):
            inner = math.group(1) or math.group(2)
            out.append(f"${html.escape(inner, quote=False) if as_html else inner}$")
            place = math.end()
        elif character == "\\":
            piece, place = _command(text, place, as_html, depth)
            out.append(piece)
        elif character in "{}":
            place += 1
        elif character == "~":
            out.append(" ")
            place += 1
        else:
            out.append(html.escape(character, quote=False) if as_html else character)
            place += 1
    return re.sub(r"\s+", " ", "".join(out)).strip()


def _command(text: str, place: int, as_html: bool, depth: int) -> tuple[str, int]:
    """Return what a command at `place` writes, and where the text goes on; unknown ones stay as they are."""
    if text.startswith("\\\\", place):
        return "<br>", place + 2
    named = _NAME.match(text, place)
    if named is None:  # \&, \%, \$, \#, \_, \{, \}, and thin spaces
        character = text[place + 1 : place + 2]
        if character in (",", ";", ":", " ", "!"):
            return "" if character == "!" else " ", place + 2
        if character == "$":
            return "\\$", place + 2  # a bare one would begin math
        return (html.escape(character, quote=False) if as_html else character or "\\"), place + 2
    name, end = named.group(1), named.end()
    if name in _STYLES and text[end : end + 1] == "{" and depth < MAX_DEPTH:
        content, end = _group(text, end)
        before, after = _STYLES[name]
        if as_html:
            before, after = _HTML_STYLES.get(before, (before, after))
        inner = plain_text(content, as_html, depth + 1)
        return (f"{before}{inner}{after}" if inner else ""), end
    if name in _SYMBOLS:
        return _SYMBOLS[name], end + len(re.match(r"\{\}| ?", text[end:]).group())
    if name == "newline":
        return "<br>", end
    if name in ("begin", "end") and text[end : end + 1] == "{":  # a table within a cell: its text
        _, end = _group(text, end)
        if name == "begin" and text[end : end + 1] == "{":
            _, end = _group(text, end)
        return "", end
    return (html.escape(text[place:end], quote=False) if as_html else text[place:end]), end


def write_markdown(table: Table) -> str:
    """Write a plain table as Markdown; its first row is the head, because Markdown has no table without one."""
    width = max(len(row) for row in table.rows)
    lines = []
    for row in table.rows:
        texts = [plain_text(cell.text).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(texts + [''] * (width - len(texts)))} |")
    lines.insert(1, "|" + " --- |" * width)
    return "\n".join(lines)


def write_html(table: Table) -> str:
    """Write a table as HTML, with merged cells as `rowspan` and `colspan`."""
    lines = ["<table>"]
    for row in table.rows:
        cells = []
        for cell in row:
            spans = f' rowspan="{cell.rows}"' * (cell.rows > 1) + f' colspan="{cell.columns}"' * (cell.columns > 1)
            cells.append(f"<td{spans}>{plain_text(cell.text, as_html=True)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])
