"""Answers become Markdown: LaTeX tables and math are turned, the rest stays as it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_vl.reading.markdown import to_markdown


def table(body: str, name: str = "tabular", columns: str = "{lr}") -> str:
    return f"\\begin{{{name}}}{columns}\n{body}\n\\end{{{name}}}"


def test_plain_text_and_markdown_stay_as_they_are():
    text = "# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n5 $ & 10 % of a_b, C:\\begin, \\section"
    assert to_markdown(text) == text


def test_a_table_becomes_a_markdown_table_with_its_first_row_as_head():
    body = (
        r"\hline Item & Price \\ \hline \hline"
        + "\n"
        + r"Tea \& milk & 3.50 \\[2pt] \midrule"
        + "\n"
        + r"50\,\% & \$2"
    )
    assert to_markdown(f"Before.\n{table(body)}\nAfter.") == (
        "Before.\n\n| Item | Price |\n| --- | --- |\n| Tea & milk | 3.50 |\n| 50 % | \\$2 |\n\nAfter."
    )


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("tabular", "{|l|p{3cm}|}"), ("tabular", "[t]{ll}"), ("tabular*", "{5cm}{ll}"), ("tabularx", "{\\textwidth}{lX}"),
        ("longtable", "{ll}"),
    ],
)  # fmt: skip
def test_every_kind_of_table_is_read(name, columns):
    assert to_markdown(table(r"a & b \\ c & d", name, columns)) == "| a | b |\n| --- | --- |\n| c | d |"


def test_merged_cells_become_html():
    body = (
        r"\multirow{2}{*}{Name} & \multicolumn{2}{c|}{\textbf{Years} < 3} \\ \cline{2-3} & 2024 & 2025 \\ Ann & 1 & 2"
    )
    assert to_markdown(table(body, columns="{lll}")) == (
        '<table>\n<tr><td rowspan="2">Name</td><td colspan="2"><b>Years</b> &lt; 3</td></tr>\n'
        "<tr><td>2024</td><td>2025</td></tr>\n<tr><td>Ann</td><td>1</td><td>2</td></tr>\n</table>"
    )


def test_a_cell_that_is_merged_both_ways_covers_both():
    body = r"\multicolumn{2}{c}{\multirow{2}{*}{x}} & a \\ \multicolumn{2}{c}{} & b \\ c & d & e"
    assert '<td rowspan="2" colspan="2">x</td><td>a</td></tr>\n<tr><td>b</td></tr>' in to_markdown(table(body))


def test_an_empty_cell_that_nothing_covers_stays():
    assert to_markdown(table(r"a & & c \\ & d &")) == "| a |  | c |\n| --- | --- | --- |\n|  | d |  |"


def test_styles_math_and_pipes_within_cells():
    body = r"\textbf{Sum} \textit{of} $a & b$ & x|y \\ \unknown{z} & $a_1$ and \(b\)"
    assert to_markdown(table(r"\textbf{Sum} \textit{of} & x|y \\ \unknown{z} & $a_1$ and \(b\)")) == (
        "| **Sum** *of* | x\\|y |\n| --- | --- |\n| \\unknownz | $a_1$ and $b$ |"
    )
    assert to_markdown(table(body)).startswith("|")  # an & within math is no LaTeX, and no error


def test_rows_of_different_length_are_filled():
    assert to_markdown(table(r"a & b & c \\ d")) == "| a | b | c |\n| --- | --- | --- |\n| d |  |  |"


def test_a_caption_stays_and_the_float_goes():
    text = "\\begin{table}[h]\n\\centering\n\\caption{Sales of \\textbf{tea}}\n" + table(r"a & b") + "\n\\end{table}\n"
    assert to_markdown(text) == "Sales of **tea**\n\n| a | b |\n| --- | --- |"


def test_a_table_that_is_cut_off_keeps_its_rows():
    assert to_markdown("\\begin{tabular}{ll}\na & b \\\\\nc & d \\\\\n\\mul") == (
        "| a | b |\n| --- | --- |\n| c | d |\n| \\mul |  |"
    )


def test_a_table_within_a_cell_becomes_its_text():
    inner = table(r"x \\ y", columns="{l}")
    assert "<td>x<br>y</td><td>3</td>" in to_markdown(table(rf"a & b \\ {inner} & 3")).replace("\n", " ").replace(
        " <br> ", "<br>"
    )


@pytest.mark.parametrize(
    ("latex", "markdown"),
    [
        (r"Let \(x^2\) be.", "Let $x^2$ be."),
        (r"\[ x = 1 \]", "$$\nx = 1\n$$"),
        ("\\begin{equation}\nx\n\\end{equation}", "$$\nx\n$$"),
        ("\\begin{align*}\na&=b\n\\end{align*}", "$$\n\\begin{aligned}\na&=b\n\\end{aligned}\n$$"),
        (r"costs \( and \] alone", r"costs \( and \] alone"),
    ],
)
def test_math_gets_the_signs_of_markdown(latex, markdown):
    assert to_markdown(latex) == markdown


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [r"\begin{tabular}{ll}", r"\end{tabular}", r"\begin{tabular}", "&", r"\\", r"\\[1", "{", "}", "[", "]", "$",
             r"\multicolumn{2}{c}{", r"\multirow{", r"\multirow{-1}{*}{x}", r"\multicolumn{99999999}{c}{x}", r"\textbf{",
             r"\caption{", r"\(", r"\)", r"\[", r"\]", r"\hline", r"\cline{", "x", "\n", "\\", "|", "é\u2028"]
        ),
        max_size=40,
    )
)  # fmt: skip
def test_no_answer_is_an_error(pieces):
    assert isinstance(to_markdown("".join(pieces)), str)


def test_a_hostile_answer_takes_no_long_time_and_no_deep_stack():
    hostile = r"\begin{tabular}{l}" * 2000 + "{" * 20000 + "&" * 20000 + r"\multirow{2}{*}{" * 500 + r"\textbf{" * 2000
    assert to_markdown(hostile)
    assert to_markdown("\\begin{tabular}{l}" + r"\multicolumn{99999999}{c}{x} & " * 300 + "\\end{tabular}")
