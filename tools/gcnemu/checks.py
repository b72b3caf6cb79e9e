"""What a run can find, in words that a kernel's author understands."""

from __future__ import annotations

from dataclasses import dataclass

FAULT, NOTE = "fault", "note"
# Kind number in gcn.h: name, severity, explanation. Notes are legal on hardware.
KINDS = {
    1: ("outside-tensor", FAULT, "touches memory outside every live tensor"),
    2: ("outside-lds", FAULT, "touches LDS outside the allocation; hardware returns 0 or drops it"),
    3: ("lds-race", FAULT, "touches LDS that another wave touches with no barrier in between"),
    4: ("outside-scratch", FAULT, "touches scratch memory outside the lane's allocation"),
    5: ("read-only", FAULT, "writes memory that the launch may only read"),
    6: ("buffer-read-zero", NOTE, "reads past num_records; hardware returns 0"),
    7: ("buffer-write-dropped", NOTE, "writes past num_records; hardware drops it"),
    8: ("buffer-resource", FAULT, "uses a swizzled or add_tid buffer, which is not modelled"),
    9: (
        "lds-dma-early", FAULT,
        "reads LDS before the asynchronous copy into it has landed: s_waitcnt vmcnt is missing "
        "or too weak",
    ),
}  # fmt: skip
ORDER_DEPENDENT = "order-dependent"
UNINITIALISED = "uninitialised"


@dataclass(frozen=True)
class Found:
    """One kind of finding at one instruction, with the first place where it happened.

    Attributes:
        kind: a name of `KINDS`, `order-dependent` or `uninitialised`.
        severity: `fault`, or `note` for what hardware defines.
        count: how many lanes did it.
    """

    kind: str
    severity: str
    message: str
    instruction: str = ""
    line: int = 0
    source: str = ""
    workgroup: tuple[int, int, int] = (0, 0, 0)
    wave: int = 0
    lane: int = 0
    address: int = 0
    size: int = 0
    count: int = 1

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        what = f": `{self.instruction}` (assembly line {self.line})" if self.instruction else ""
        return f"{self.kind}{where}{what} {self.message}"


def order_dependent(where: str) -> Found:
    return Found(
        ORDER_DEPENDENT,
        FAULT,
        f"the result depends on the order in which waves run: a race ({where})",
    )


def uninitialised(where: str) -> Found:
    return Found(
        UNINITIALISED,
        FAULT,
        "the result depends on registers, LDS or scratch that nothing has written, or on data "
        f"that had not landed ({where})",
    )
