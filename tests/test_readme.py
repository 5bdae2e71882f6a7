"""What the README and the packaging files promise exists: commands, links, one pinned list of dependencies."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from helpers import ledger
from helpers.__main__ import _parser
from helpers.workbook.doctor import pins

ROOT = Path(__file__).resolve().parents[1]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def readme():
    path = ROOT / "README.md"
    assert path.exists(), "README.md is missing."
    return path.read_text(encoding="utf-8")


def commands():
    """Shell commands of the README, one a piece: the lines of its code blocks and its inline code."""
    text = readme()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in block.splitlines()] + inline
    pieces = [
        piece.split("#")[0].strip(" $") for line in lines for piece in re.split(r"&&|;|\|", line)
    ]
    return [piece for piece in pieces if piece]


def test_make_targets_exist():
    named = {
        word
        for command in commands()
        if re.match(r"make(\s|$)", command)
        for word in command.split()[1:]
        if "=" not in word and not word.startswith("-")
    }
    assert {"run", "test"} <= named and named <= TARGETS


def test_helper_commands_exist():
    parser = _parser()
    (choices,) = [action.choices for action in parser._actions if action.choices]
    named = set(re.findall(r"-m helpers ([a-z][\w-]*)", readme()))
    assert {"run", "doctor"} <= named and named <= set(choices)


def test_helper_commands_have_the_options_shown():
    parser = _parser()
    for command in commands():
        words = re.split(r"-m helpers\s+", command)
        if (
            len(words) == 2
            and words[1]
            and "…" not in words[1]
            and "[" not in words[1]
            and not words[1].startswith("bench")
        ):
            parser.parse_args(
                words[1].split()
            )  # exits, and so fails, on an option that does not exist


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", readme()) + re.findall(r'src="([^"]+)"', readme())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_requirement_is_pinned_and_has_its_reason():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line and line[0] != "#"
    ]
    assert all(
        re.fullmatch(r"([\w.-]+==[\w.]+|-e \.)\s+# \S.{10,}", line) for line in lines
    ) and lines[-1].startswith("-e .")
    assert len(pins()) == len(lines) - 1 and pins()["torch"] == "2.13.0"


def test_environment_points_to_the_one_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert (
        environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
        and "pip" in environment["dependencies"]
    )


def test_ci_runs_the_two_commands():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines and lines.index("make test") < lines.index("make run")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "run", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode != 0
        and "needs Python 3.11 or newer" in done.stderr
        and not (tmp_path / ".venv").exists()
    )


def test_results_in_the_readme_are_the_last_verdicts():
    assert set(ledger.MARKS) <= set(readme().splitlines())
    shown = dict(re.findall(r"^\| \**(.+?)\** \| .*\| ([\w ]+) \|$", readme(), re.M))
    for claim in ledger.claims().values():
        assert shown.get(claim["claim"]) == (claim["last_verdict"] or "not attempted"), claim["id"]
