"How tests call the commands, and a text of rhymes for them."

from typer.testing import CliRunner

from llm_course import cli

RHYMES = [f"The {a} {b} the {c}.\n" for a in ("cat", "dog", "hen", "old king")
          for b in ("saw", "fed", "lost") for c in ("mouse", "moon", "ball", "house")]


def call(*arguments, stdin=None, code=0):
    "Run a command inside this process; returns what it printed."
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output
