import csv
import io

import pytest

from expunge.report.formats import latex, markdown, to_csv, to_latex, to_markdown
from expunge.report.tables import Cell, Line, Table, headline
from expunge.rows import Row

MARKDOWN = """\
| figure | reference | unlearned | ratio | n |
| :--- | ---: | ---: | ---: | ---: |
| toxicity, sampled, challenge, ngram | 0.500 [0.375, 0.625] | 0.250 [0.125, 0.375] | 0.500 [0.250, 0.750] | 4 |
| toxicity, sampled, pairs, rejected side, k = 8, ngram | 0.750 [0.625, 0.875] | 0.500 [0.375, 0.625] | 0.667 [0.250, 0.750] | 4 |
| perplexity, wikitext2, exact | 64.00 [63.88, 64.12] | 80.00 [79.88, 80.12] | 1.250 [0.250, 0.750] | 4 |
"""  # noqa: E501

CSV = """\
group,figure,reference,reference low,reference high,unlearned,unlearned low,unlearned high,ratio,ratio low,ratio high,n
Toxicity of continuations,"toxicity, sampled, challenge, ngram",0.5,0.375,0.625,0.25,0.125,0.375,0.5,0.25,0.75,4
"""

LATEX = r"""\begin{tabular}{lrrrr}
\toprule
figure & reference & unlearned & ratio & n \\
\midrule
\multicolumn{5}{l}{\textit{Toxicity of continuations}} \\
toxicity, sampled, challenge, ngram & 0.500 [0.375, 0.625] & 0.250 [0.125, 0.375] & 0.500 [0.250, 0.750] & 4 \\
\midrule
\multicolumn{5}{l}{\textit{Toxicity after forced tokens}} \\
toxicity, sampled, pairs, rejected side, k = 8, ngram & 0.750 [0.625, 0.875] & 0.500 [0.375, 0.625] & 0.667 [0.250, 0.750] & 4 \\
\midrule
\multicolumn{5}{l}{\textit{Utility}} \\
perplexity, wikitext2, exact & 64.00 [63.88, 64.12] & 80.00 [79.88, 80.12] & 1.250 [0.250, 0.750] & 4 \\
\bottomrule
\end{tabular}
"""  # noqa: E501


@pytest.mark.parametrize(("form", "text"), [(to_markdown, MARKDOWN), (to_latex, LATEX)])
def test_a_run_as_text(run_rows, form, text):
    assert form(headline({"a": run_rows()})) == text


def test_csv_is_unrounded(run_rows):
    assert to_csv(headline({"a": run_rows()})).startswith(CSV)
    rows = [Row("evaluate", "unlearned", "perplexity", 1234.56789, n=3, mode="exact")]
    assert "1234.56789,,,3" in to_csv(headline({"a": rows}))


def test_a_count_has_no_ends_in_csv():
    table = Table(("step", "ratio", "frontier", "n"), (Line("a", "5", "", (Cell(0.5), Cell(), Cell(4))),), counts=2)
    header, line = csv.reader(io.StringIO(to_csv(table)))
    assert header == ["group", "step", "ratio", "ratio low", "ratio high", "frontier", "n"]
    assert line == ["a", "5", "0.5", "", "", "", "4"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (r"&%$#_{}", r"\&\%\$\#\_\{\}"),
        ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ("<|>", r"\textless{}\textbar{}\textgreater{}"),
        ("−1 – 2", "$-$1 -- 2"),
        ("[2pt]", "{[}2pt{]}"),
        ("*", "{*}"),
        ("a\n\nb", "a b"),
        ("a\u202eb", "a{[}U+202E{]}b"),
        ("distinct-2", "distinct-2"),
    ],
)
def test_latex_reads_nothing_into_a_name(text, escaped):
    assert latex(text) == escaped


def test_minus_and_absence_in_latex():
    table = Table(("figure", "difference", "n"), (Line("a", "b-1", "", (Cell(-0.5, -0.75, -0.25), Cell(4))),) * 2)
    assert r"b-1 & $-$0.500 [$-$0.750, $-$0.250] & 4 \\" in to_latex(table)
    table = Table(("figure", "ratio", "n"), (Line("a", "b", "", (Cell(), Cell(4))),))
    assert r"b & -- & 4 \\" in to_latex(table)


def test_markdown_reads_nothing_into_a_name():
    assert markdown("a|b\n<script>[x](y)`*\\") == r"a\|b \<script\>\[x\](y)\`\*\\"
    table = Table(("figure", "n"), (Line("a", "<b>|", "", (Cell(4),)),))
    assert to_markdown(table).splitlines()[-1] == r"| \<b\>\| | 4 |"
