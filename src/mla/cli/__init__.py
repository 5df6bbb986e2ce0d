"""The command ``mla``: one file per verb, imported light; torch loads when a verb runs."""

import sys

import typer

from mla.cli import chat, convert, doctor, evaluate, generate, plan, serve
from mla.errors import MLAError

app = typer.Typer(
    name="mla",
    help="Multi-head Latent Attention for the machines people own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("convert")(convert.convert)
app.command("eval")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)


def main() -> None:
    """Run the command line: a user's mistake is one line and exit status 2, an interruption 130."""
    try:
        app(prog_name="mla")
    except MLAError as error:
        print(f"mla: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mla: interrupted", file=sys.stderr)
        sys.exit(130)
