"""The front door: `powerinfer SUBCOMMAND ...`, and the short names of three of them.

Every error that a user can cause ends here as one sentence on stderr and exit code 1 (bad usage:
2, Ctrl-C: 130).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from .runtime.errors import PowerInferError

# Name -> what it does. Each is a module of powerinfer.commands with add_arguments() and run();
# only the one that is called is imported.
COMMANDS = {
    "convert": "a Hugging Face checkpoint (and predictors) -> GGUF",
    "quantize": "a GGUF file -> the same in a smaller type",
    "profile": "count who fires on a text; hot neurons first",
    "train-predictors": "predictors for a model, from a text",
    "perplexity": "quality on a text, KL divergence, recall",
    "heat": "a picture of who fires",
    "bench": "speed, and the bound that memory sets",
    "plan": "what lives on the GPU under a budget",
    "infer": "continue a prompt",
    "doctor": "what this machine can do, and what is wrong",
    "inspect": "show what is in a file",
}

_kept: list[object] = []  # what C calls, and does not keep alive


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Run one command and return its exit code."""
    _open_standard_streams()
    _end_on_signals()
    _end_on_bus_errors(prog)
    try:
        module = importlib.import_module(f"{__package__}.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(prog=prog, description=module.__doc__)
        module.add_arguments(parser)
        args = parser.parse_args(argv)
        return int(module.run(args, parser))
    except PowerInferError as error:
        message = str(error)
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        message = f"{where}{error.strerror}" if error.strerror else str(error)
    except MemoryError:
        message = "there is not enough memory for this"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 130 if message == "interrupted" else 1


def _open_standard_streams() -> None:
    """Give streams that the caller has closed an end of their own: nothing else may get them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    # What cannot be shown in the terminal's encoding is shown escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the program, so that no half-written file stays behind."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(getattr(signal, name), end)


def _end_on_bus_errors(prog: str) -> None:
    """End with a sentence where a mapped file cannot be read: it was cut short, or its disk fails.

    Machine code is in the middle of something then, so that there is nothing to go back to; Python
    itself would handle the signal only when that goes on, which it never does.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    text = f"{prog}: error: a file could not be read: it is shorter now than it was, or damaged\n"

    def end(_number: int) -> None:
        os.write(2, text.encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `powerinfer SUBCOMMAND ...`."""
    commands = "\n".join(f"  {name:<16} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="powerinfer",
        usage="powerinfer COMMAND ...   (powerinfer COMMAND -h for its options)",
        description=f"GGUF toolchain and runtime for ReLU-sparse language models.\n\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="say which version this is")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv[:1])
    if args.version:
        from . import __version__

        print(f"powerinfer-python {__version__}")
        return 0
    if args.command is None:
        parser.error("a COMMAND is needed")
    return run_command(args.command, argv[1:], f"powerinfer {args.command}")


def main_convert() -> int:
    """Run `convert-hf-to-powerinfer-gguf`."""
    return run_command("convert", sys.argv[1:], "convert-hf-to-powerinfer-gguf")


def main_quantize() -> int:
    """Run `quantize`."""
    return run_command("quantize", sys.argv[1:], "quantize")


def main_infer() -> int:
    """Run `infer`."""
    return run_command("infer", sys.argv[1:], "infer")


if __name__ == "__main__":
    sys.exit(main())
