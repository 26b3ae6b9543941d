"""What reading a pickle would cost, found without making anything of it: only its opcodes are read.

A pickle is a program. That no code of the file is run, the readers see to; but their own opcodes are enough to fill the
memory (a memo of four thousand million places takes 9 bytes) or to never end (the hash of a tuple that holds one tuple
twice, which holds one tuple twice, and so on). So the program is followed here with what each of its values would cost.
"""

from __future__ import annotations

import pickletools
import re
import sys
from typing import IO, Any, cast

FREE = 48 << 20  # bytes that the values of any pickle may take beside half its own size
# Bytes that an opcode's value takes at most, beside what its argument holds.
COSTS = {
    "EMPTY_SET": 256,
    "FROZENSET": 256,
    "EMPTY_DICT": 320,
    "DICT": 320,
    "EMPTY_LIST": 96,
    "LIST": 96,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), 112),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "PERSID", "BINPERSID"), 512),
}
OTHER_COST = 56
VISIT_COST = 8  # of every value inside one that is put into another, since it may be hashed there
# A long text is bytes in disguise, a letter each. One wide letter would make all of it take four times the memory.
LONG_TEXT = 1 << 16
TEXT_CODES = (b"X", b"\x8d")
WIDE = re.compile(rb"[\xc4-\xff]")  # how letters above U+00FF begin in UTF-8
# Names that torch would call, and that take memory which no byte of the file stands for.
HUNGRY = frozenset(("builtins bytearray", "__builtin__ bytearray", "torch Tensor"))


class PickleError(Exception):
    """A pickle that is cut off or wrong, or that would cost too much."""


def check_pickle(file: IO[bytes], size: int, *, by_torch: bool = False) -> int:
    """Follow the pickle that begins at the file's position to its end; returns how many of `size` bytes it has.

    Args:
        by_torch: torch will read it, which makes bytes of a text wherever the file says so, and calls more names.

    Raises:
        PickleError: says what is wrong.
    """
    stream = _Stream(file, size)
    program = _Program(FREE + size // 2, by_torch)
    try:
        for opcode, argument, _ in pickletools.genops(cast(Any, stream)):  # which needs these two methods only
            if opcode.name == "FRAME" and cast(int, argument) > stream.left:
                raise PickleError("it is cut off")
            program.step(opcode, argument)
            stream.code = b""
    except (LookupError, ValueError, ArithmeticError) as error:
        raise PickleError(f"{type(error).__name__}: {str(error)[:200]}") from error
    return size - stream.left


class _Stream:
    """So many bytes of a file, none of them promised: no length in the file makes it take memory that is not there."""

    def __init__(self, file: IO[bytes], size: int):
        self.file = file
        self.left = size
        self.code = b""  # of the opcode being read

    def read(self, count: int) -> bytes:
        data = self.file.read(max(0, min(count, self.left)))
        self.left -= len(data)
        if not self.code:
            self.code = data
        elif count > LONG_TEXT and self.code in TEXT_CODES and WIDE.search(data):
            raise PickleError("it has a long text in wide letters")
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        if len(data) > LONG_TEXT:
            raise PickleError("it has a very long line")
        return data


class _Program:
    """A pickle's stack and memo, which hold for each value how many values a look at all of it would visit."""

    def __init__(self, budget: int, by_torch: bool):
        self.budget = budget
        self.by_torch = by_torch
        self.stack: list[int | None] = []  # None: a mark
        self.memo: dict[int, int | None] = {}
        self.steps = 0
        self.encodes = False
        self.longest_text = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        self.steps += 1
        self.pay(COSTS.get(opcode.name, OTHER_COST))
        if isinstance(argument, str):
            self.look_at_text(opcode.name, argument)
        if opcode.name == "REDUCE" and self.encodes:
            self.pay(self.longest_text)  # a copy as bytes
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if argument is None else int(argument)
            if not 0 <= place <= self.steps:  # a memo is an array
                raise PickleError(f"it names place {place} of its memo after {self.steps} steps")
            self.memo[place] = self.stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif opcode.name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self.follow(opcode)

    def look_at_text(self, name: str, text: str) -> None:
        self.pay(max(0, sys.getsizeof(text) - len(text)))  # one wide letter makes all of them wide
        self.longest_text = max(self.longest_text, len(text))
        if name == "GLOBAL" and self.by_torch:
            self.encodes = self.encodes or text == "_codecs encode"
            if text in HUNGRY:
                raise PickleError(f"it asks for {text.replace(' ', '.')}")

    def follow(self, opcode: pickletools.OpcodeInfo) -> None:
        taken = self.take(opcode)
        inside = sum(taken)
        self.pay(VISIT_COST * (inside - len(taken)))
        is_tuple = opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
        for made in opcode.stack_after:
            self.stack.append(None if made is pickletools.markobject else 1 + inside if is_tuple else 1)

    def take(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """The values that an opcode takes off the stack."""
        count, taken = len(opcode.stack_before), []
        if pickletools.markobject in opcode.stack_before:
            count = opcode.stack_before.index(pickletools.markobject)
            while (value := self.stack.pop()) is not None:
                taken.append(value)
        for _ in range(count):
            value = self.stack.pop()
            if value is not None:  # POP may take a mark
                taken.append(value)
        return taken

    def pay(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise PickleError("reading it would take more memory or time than weights of its size need")
