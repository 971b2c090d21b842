"""The CPU's part in an exchange of words with a device (cuda/ahead.py): wait for one, write one.

Words of an exchange are numbers: `number`, counted from what lies at `base`.
"""

from __future__ import annotations

from .block import layout
from .jit import arg, inline, job
from .pool import finish, take, wait
from .simd import atomic_load, atomic_store, load_i64, pause, yield_core

_SPINS = 1000  # looks before the core is offered to others

EXCHANGE = layout("flag answer base number patience stop")


@inline
def _value(args):
    """Return the number of an exchange: in a token, from where the token's numbers begin."""
    return load_i64(arg(args, EXCHANGE.base)) + arg(args, EXCHANGE.number)


@job
def await_flag(args, control, epoch, thread):
    """Wait for the device to come to an exchange; stop = whether that takes too long."""
    while take(control, 0, epoch, 1) >= 0:
        flag, value, looks = arg(args, EXCHANGE.flag), _value(args), 0
        # Of the flag the device writes the lower 32 bits, which wrap.
        while (atomic_load(flag) - value) & 0x80000000 and looks < arg(args, EXCHANGE.patience):
            looks += 1
            pause()
            if looks > _SPINS:
                yield_core()
        is_late = (atomic_load(flag) - value) & 0x80000000
        atomic_store(arg(args, EXCHANGE.stop), is_late)
        finish(control, 0)
    wait(control, 0, epoch, 1)


@job
def answer(args, control, epoch, thread):
    """Let the device go on: all jobs of an exchange are done."""
    while take(control, 0, epoch, 1) >= 0:
        atomic_store(arg(args, EXCHANGE.answer), _value(args))
        finish(control, 0)
    wait(control, 0, epoch, 1)
