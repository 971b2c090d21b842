"""The CPU's part in an exchange of words with a device (cuda/ahead.py): wait for one, write one.

Words of an exchange are numbers: `number`, counted from what lies at `base`.
"""

from __future__ import annotations

from .block import layout
from .jit import arg, inline, job
from .pool import finish, take, wait
from .simd import atomic_load, atomic_store, load_i64, pause, yield_core

_SPINS = 1000  # looks before the core is offered to others

EXCHANGE = layout("flag answer base early number patience stop")


@inline
def _value(exchange, number):
    """Return a number of an exchange: in a token, from where the token's numbers begin."""
    return load_i64(arg(exchange, EXCHANGE.base)) + arg(exchange, number)


@inline
def is_late(exchange):
    """Return whether somebody has waited too long: the program ends with this job not done."""
    return atomic_load(arg(exchange, EXCHANGE.stop)) != 0


@inline
def has_come(exchange, number):
    """Wait for the device to come to a number; False, and stop = 1, if that takes too long.

    EXCHANGE.number says that all is there that an exchange needs, EXCHANGE.early that the input is.
    """
    flag, value, looks = arg(exchange, EXCHANGE.flag), _value(exchange, number), 0
    # Of the flag the device writes the lower 32 bits, which wrap.
    while (atomic_load(flag) - value) & 0x80000000:
        if looks >= arg(exchange, EXCHANGE.patience) or is_late(exchange):
            atomic_store(arg(exchange, EXCHANGE.stop), 1)
            return False
        looks += 1
        pause()
        if looks > _SPINS:
            yield_core()
    return True


@inline
def answer(exchange):
    """Let the device go on from an exchange."""
    atomic_store(arg(exchange, EXCHANGE.answer), _value(exchange, EXCHANGE.number))


@job
def await_flag(args, control, epoch, thread):
    """Wait for the device to come to an exchange, args."""
    while take(control, 0, epoch, 1) >= 0:
        has_come(args, EXCHANGE.number)
        finish(control, 0)
    wait(control, 0, epoch, 1)
