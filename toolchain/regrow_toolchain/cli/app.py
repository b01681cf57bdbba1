"""The command line. This module imports click and nothing else, so that `--help` answers at once.

A command is one file in `commands/` with a click command of the same name (`import_.py` for
`import`, which Python keeps for itself); listing it in `COMMANDS` with its one-line help is all the
registration there is.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from keyword import iskeyword
from types import FrameType
from typing import Any

import click

__all__ = ["COMMANDS", "main", "printable"]

COMMANDS = {
    "demo": "See the whole of regrow work on real handwriting, with a report.",
    "compress": "Compress a model: low-rank factors (PELA), then distillation.",
    "adapt": "Train one small adapter for one user.",
    "export": "Export a backbone to ONNX, with slots for adapters.",
    "import": "Make an adapter of one that PEFT trained, without torch.",
    "convert": "Write an adapter as dense tensors, for programs without regrow.",
    "run": "Run a bundle on images, audio, text or arrays, without torch.",
    "verify": "Check a bundle and adapters: files, outputs, what they did at export.",
    "store": "Keep adapters on the device, by user and version.",
    "profile": "Measure a bundle: latency, RAM, swaps, with a page that shows them.",
    "inspect": "Tell what an adapter file, a bundle or a backbone holds.",
}

_INTERRUPTED = 130
_LATER = 0.05  # seconds


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        file = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        module = import_module(f".commands.{file}", __package__)
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(package_name="regrow", message="regrow %(version)s")
@click.pass_context
def _group(ctx: click.Context) -> None:
    """Compress a model once, give every user an adapter of a few kilobytes, swap it on the device.

    Start with: regrow demo
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 usage, 130 interrupted."""
    # A polite kill ends like Ctrl-C: temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "setitimer") and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
    sys.exit(_run(arguments))


def _terminate(_number: int, _frame: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Ctrl-C. While compiled modules are loaded it waits: some abort where it strikes them."""
    while frame is not None:
        if _is_loading(frame):
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_loading(frame: FrameType) -> bool:
    """Whether it loads a compiled module, or torch, whose modules call its C++ as they load; or
    cleans up after an import, where Python would swallow the interrupt.
    """
    if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
        return True
    if frame.f_code.co_filename == "<frozen importlib._bootstrap>" and frame.f_code.co_name == "cb":
        return True
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return frame.f_code.co_name == "<module>" and package == "torch"


def _run(arguments: list[str] | None) -> int:
    try:
        _group.main(arguments, prog_name="regrow", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ or error  # click makes an Abort of an interrupt
        told = str(cause) if isinstance(cause, KeyboardInterrupt) else ""
        return _fail(f"interrupted: {told}" if told else "interrupted", _INTERRUPTED)
    except click.ClickException as error:
        command = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        )
        hint = f" (see {command} --help)" if command else ""
        return _fail(f"{error.format_message()}{hint}", error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: be quiet
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        from regrow_format.errors import RegrowError  # not above: importing it takes a while

        if not isinstance(error, RegrowError):
            raise
        return _fail(str(error), error.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    lines = (printable(line) for line in message.splitlines())
    click.echo("regrow: " + "\n".join(lines), err=True)
    return code


def printable(text: str) -> str:
    """`text` without control characters: labels and names in files come from strangers, and a
    terminal obeys escape sequences. Joiners stay: words of some scripts are not written without.
    """
    joiners = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
    return "".join(
        c if c.isprintable() or c in joiners else "\N{REPLACEMENT CHARACTER}" for c in text
    )
