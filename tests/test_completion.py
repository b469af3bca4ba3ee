"""Tests of --version and of the completion scripts, in the shells that are here."""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import mnclglf
from mnclglf.cli import SHELLS, main, parse


def printed_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what a command prints that ends with 0 before anything runs."""
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_version_is_pip_s(capsys: pytest.CaptureFixture[str]) -> None:
    installed = importlib.metadata.version("mnclglf")
    assert printed_by(["--version"], capsys) == f"mnclglf {installed}\n"
    assert mnclglf.__version__ == installed


def test_the_help_names_what_has_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by(["--help"], capsys)
    for word in ("--version", "--print-completion", "mnclglf doctor"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [(["ksh"], "ksh", "bash, zsh"), ([], "--print-completion", "bash, zsh"), (["bash", "zsh"], "one shell", "bash")],
)
def test_another_shell_is_refused(
    arguments: list[str], value: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-completion", *arguments]) == 2
    said = capsys.readouterr().err
    assert value in said
    assert remedy in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mnclglf tr", {"train"}),
        ("mnclglf data ins", {"inspect"}),
        ("mnclglf train --meth", {"--method"}),
        ("mnclglf train --dataset digits --method sim", {"simclr", "simsiam"}),
        ("mnclglf knn runs/x --vote", {"--vote-temperature"}),
    ],
)
def test_bash_completes(line: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "completion with a blank.bash"
    script.write_text(printed_by(["--print-completion", "bash"], capsys))
    words = shlex.split(line)
    # What bash itself does when the tab key is pressed, by the function that the script registers.
    program = f"""
set -e
source {shlex.quote(str(script))}
function=$(complete -p mnclglf); function=${{function#*-F }}; function=${{function%% *}}
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
"$function" mnclglf {shlex.quote(words[-1])} {shlex.quote(words[-2])}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_of_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by(["--print-completion", shell], capsys)
    assert ("complete -F" if shell == "bash" else "#compdef mnclglf") in text
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, env={**os.environ})
        assert (done.returncode, done.stderr) == (0, "")
