"""The command line: the commands' results as text and as JSON, exit codes, no traceback for what a user can mend."""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from implicitdiff import combinatorial, problems
from implicitdiff.cli import main
from implicitdiff.plan import BACKWARDS
from implicitdiff.solvers import SOLVERS

OWN = '''
import torch
import implicitdiff as idf


class Median(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + eps)"""

    def __init__(self, eps=1e-3):
        super().__init__()
        self.eps = eps

    def objective(self, u, x):
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + self.eps).sum()

    def init(self, x):
        return x.mean(1)

    def example(self, batch=2, n=5):
        return (torch.randn(batch, 3, n, generator=torch.Generator().manual_seed(0)),)


class Wrong(Median):
    def vjp(self, u, v, x):
        return torch.ones_like(x)


class Sorted(Median):
    def objective(self, u, x):
        return ((torch.sort(u).values - x.mean(1)) ** 2).sum()


class Needy(Median):
    def __init__(self, width):
        super().__init__()


class Torn(Median):
    def example(self):
        return (torch.ones(3) + torch.ones(4),)


class Bare(idf.Problem):
    def objective(self, u, x):
        return (u * u).sum()

    def init(self, x):
        return x


ready = Median(eps=0.5)
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A user's file."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """80 columns and no colour, whatever runs the tests; modules of user files are forgotten."""
    for name in ("FORCE_COLOR", "IMPLICITDIFF_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    yield
    for name in [name for name in sys.modules if name.startswith("implicitdiff_file_")]:
        del sys.modules[name]


def run(*words: str, code: int = 0) -> Result:
    """Run a command; a traceback of any kind fails the test."""
    result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == code, result.output
    if not {"--json", "--code", "--latex", "completion"} & set(words):
        # A line with a path is as long as the path.
        lines = [line for line in result.output.splitlines() if "/" not in line]
        assert max(map(len, lines), default=0) <= 80
    return result


def run_json(*words: str, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code).stdout)


def test_list_names_everything() -> None:
    found = run_json("list")
    assert set(found["penalties"]) == set(problems.PENALTIES)
    assert set(found["solvers"]) == set(SOLVERS)
    assert set(found["backwards"]) == set(BACKWARDS)
    assert {"robust-pooling", "optimal-transport"} <= set(found["problems"])
    assert {"Identity", "Blackbox"} <= set(found["estimators"])
    assert {"Newton", "LBFGS"} <= set(found["optimizers"])
    assert {"TSP", "ShortestPath"} <= set(found["discrete-solvers"])
    assert not {"Estimator", "Solver"} & {name for names in found.values() for name in names}
    assert all(hasattr(combinatorial, name) for name in found["estimators"])
    assert all(text for names in found.values() for text in names.values()), "every name is documented"
    text = run("list").output
    assert all(name in text for names in found.values() for name in names)
    assert "welsch" in run("list", "penalties").output
    assert "Newton" not in run("list", "penalties").output


def test_explain_as_text_json_code_and_latex() -> None:
    text = run("explain", "robust-pooling", "--size", "n=17").output
    assert "inputs x (4, 17)" in text
    assert "low-rank-plus-diagonal" in text
    assert "scaled-identity" in run("explain", "RobustPooling", "-w", "penalty=quadratic").output
    found = run_json("explain", "optimal-transport", "--size", "m=5", "--size", "n=7")
    assert found["hessian"]["kind"] == "diagonal"
    assert found["hessian"]["shape"] == [35, 35]
    assert found["schur"]["kind"] == "block"
    assert run("explain", "robust-pooling", "--code").output.startswith("def backward(")
    assert run("explain", "robust-pooling", "--latex").output.startswith(r"\begin{align*}")
    assert "--code and --latex" in run("explain", "robust-pooling", "--code", "--latex", code=2).output


def test_explain_writes_a_page_and_a_picture(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "spy.svg"
    result = run("explain", "optimal-transport", "--html", str(page), "--plot", str(picture))
    assert "OptimalTransport" in page.read_text(encoding="utf-8")
    assert "</svg>" in picture.read_text(encoding="utf-8")
    assert "written" in result.stderr
    assert "written" not in result.stdout
    assert (
        "spy.foo" in run("explain", "optimal-transport", "--plot", str(tmp_path / "spy.foo"), code=3).output
    )


def test_check_says_yes_or_no_by_its_exit_code(own: str) -> None:
    assert "all is well" in run("check", "optimal-transport").output
    assert "fail" in run("check", f"{own}:Wrong", code=1).output
    found = run_json("check", f"{own}:Wrong", code=1)
    assert found["ok"] is False
    assert [row["name"] for row in found["rows"] if row["verdict"].startswith("fail")] == [
        "vjp against dense"
    ]


def test_walkthrough() -> None:
    text = run("walkthrough", "optimal-transport", "--size", "m=2", "--size", "n=3").output
    assert "A H^-1 A' (5 x 5)" in text
    found = run_json("walkthrough", "robust-pooling")["steps"]
    assert found[-1]["heading"] == "The gradient, from left to right"
    assert "discrete" in run("walkthrough", "globe-tour", code=2).output


def test_compare_sweeps_and_writes_its_files(own: str, tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.csv", tmp_path / "rows.pdf"
    words = (
        "compare",
        f"{own}:Median",
        "--sizes",
        "n=4,6",
        "--size",
        "batch=3",
        "--rounds",
        "1",
        "-b",
        "auto,dense",
    )
    text = run(*words, "--csv", str(rows), "--plot", str(picture)).stdout
    assert "n = 4\n" in text
    assert "n = 6: " in text
    assert rows.read_text().startswith("n,backward,")
    assert picture.read_bytes().startswith(b"%PDF")
    found = run_json(*words)
    assert [(row["backward"], row["setting"]) for row in found["rows"]] == [
        (name, [["n", n]]) for n in (4, 6) for name in ("auto", "dense")
    ]
    assert all(row["error"] < 1e-4 for row in found["rows"])
    assert "n = 6" in found["verdict"]


def test_compare_at_one_size_takes_the_default_backwards() -> None:
    found = run_json("compare", "robust-pooling", "--size", "n=5", "--rounds", "1")
    assert [row["backward"] for row in found["rows"]] == ["hand", "auto", "dense", "unrolled"]


def test_a_problem_of_the_users_own(own: str) -> None:
    assert "sqrt(|u - x_j|^2 + eps)" in run("explain", f"{own}:Median", "--size", "n=6").output
    assert run_json("explain", f"{own}:ready")["problem"] == "Median"
    found = run_json("explain", f"{own}:Sorted")
    (step,) = found["fallbacks"]
    assert step["operation"] == "aten.sort.default"
    assert "torch.sort(u)" in step["line"]


def test_discrete_problems() -> None:
    assert "argmin of <w, y>" in run("explain", "globe-tour", "-w", "cities=4").output
    assert run_json("check", "subset-selection", "-w", "k=3")["ok"] is True
    words = (
        "compare",
        "terrain-path",
        "-w",
        "height=3",
        "-w",
        "width=3",
        "--rounds",
        "1",
        "-b",
        "identity,blackbox:lam=2",
    )
    found = run_json(*words)
    assert [row["estimator"] for row in found["rows"]][-1].startswith("Blackbox")
    assert found["verdict"] in " ".join(run(*words).output.split()) or found["verdict"].startswith("fewest")
    for more in (["-b", "blackbox"], ["-b", "auto"], ["--sizes", "n=3"], ["--plot", "x.svg"]):
        run(*words[:2], *more, code=2)
    run("explain", "globe-tour", "--code", code=2)


def test_wrong_words_end_with_code_2(own: str, tmp_path: Path) -> None:
    for words, said in (
        (("explain", "nothing"), "robust-pooling"),
        (("explain", f"{own}"), "which problem?"),
        (("explain", f"{own}:Nobody"), "Median"),
        (("explain", str(tmp_path / "absent.py") + ":A"), "there is no file"),
        (("explain", "robust-pooling", "--size", "n"), "name=value"),
        (("compare", "robust-pooling", "--sizes", "n="), "n=16,64,256"),
        (("explain", f"{own}:ready", "-w", "eps=1"), "nothing to set"),
        (("list", "nothing"), "penalties"),
    ):
        flat = " ".join(run(*words, code=2).output.split())
        assert said in flat, flat


def test_refusals_are_messages_and_end_with_code_3(own: str) -> None:
    for words, said in (
        (("explain", "robust-pooling", "--size", "k=3"), "it takes batch, m, n"),
        (("explain", "robust-pooling", "-w", "penalty=none"), "unknown penalty"),
        (("explain", "robust-pooling", "-w", "nothing=1"), "it takes penalty, alpha"),
        (("explain", f"{own}:Bare"), "declares no example"),
        (("explain", f"{own}:Needy"), "--with name=value"),
        (("explain", f"{own}:Torn"), "line 40: RuntimeError"),
        (("compare", "robust-pooling", "-b", "guess"), "'guess'"),
    ):
        flat = " ".join(run(*words, code=3).output.split())
        assert said in flat, flat
        error = run_json(*words, code=3)["error"]
        assert set(error) == {"kind", "message"}
        assert said in error["message"]


def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path: Path) -> None:
    for text, said in (
        ("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def f(:\n", "line 1: SyntaxError"),
    ):
        path = tmp_path / "torn.py"
        path.write_text(text)
        assert said in " ".join(run("check", f"{path}:A", code=3).output.split())
    path = tmp_path / "alone.py"
    path.write_text("import implicitdiff\n")
    assert "declares no subclass" in " ".join(run("check", f"{path}:A", code=2).output.split())


def test_a_bug_of_the_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("implicitdiff.explain", broken)
    result = CliRunner().invoke(main, ["explain", "robust-pooling"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_traceback_of_a_refusal_is_there_for_who_asks(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPLICITDIFF_TRACEBACK", "1")
    result = CliRunner().invoke(main, ["explain", f"{own}:Torn"])
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    assert "_IMPLICITDIFF_COMPLETE" in run("completion", shell).output


def test_completion_of_problems() -> None:
    words = {"COMP_WORDS": "implicitdiff explain rob", "COMP_CWORD": "2"}
    environment = {"_IMPLICITDIFF_COMPLETE": "bash_complete", **words}
    result = CliRunner().invoke(main, [], env=environment, prog_name="implicitdiff")
    assert "robust-pooling" in result.output


def test_every_command_has_json_and_help_of_80_columns() -> None:
    assert isinstance(main, click.Group)
    assert len(main.commands) >= 5
    for name, command in main.commands.items():
        text = run(name, "--help").output
        assert "--json" in text
        assert command.get_short_help_str(60).endswith(".") or "..." not in command.get_short_help_str(60)


def test_the_library_imports_neither_click_nor_rich_nor_matplotlib() -> None:
    code = textwrap.dedent("""
        import sys, implicitdiff
        print([name for name in ("click", "rich", "matplotlib", "implicitdiff.cli") if name in sys.modules])
    """)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_the_module_is_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "implicitdiff", "list", "penalties"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "welsch" in found.stdout


ROOT = Path(__file__).resolve().parent.parent
LONG = ("reproduce fig", "reproduce identity", "demo", "completion")


def documented() -> list[str]:
    """Every command of the README and the documents."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            lines = (line.partition("#")[0].strip() for line in block.splitlines())
            found += [line for line in lines if line.startswith("implicitdiff ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", documented())
def test_commands_in_the_documents_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_problem.py").write_text(OWN)
    words = line.split()[1:]
    if not line.removeprefix("implicitdiff ").startswith(LONG):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return
    assert isinstance(main, click.Group)
    command = main.commands[words[0]]
    command.make_context(words[0], words[1:])  # its words are read, nothing is run


def test_documents_have_commands() -> None:
    assert len(documented()) > 8
