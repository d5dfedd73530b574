"""The cost of a compiled program on one chip: memory, arithmetic, traffic and collectives."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pae_jax.devices import hardware, hlo
from pae_jax.devices.topology import first_line

GIB, MIB = 2**30, 2**20

Sizes = Mapping[str, int]  # bytes on one chip by what takes them


class Memory(NamedTuple):
    """The memory of a program on one chip as its compiler counts it, in bytes.

    Attributes:
      arguments: the arguments.
      outputs: the results.
      aliased: the part of the outputs that takes the place of donated arguments.
      temporaries: the intermediate values.
      code: the program itself; 0 on a GPU, where it is not counted.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int


class Costs(NamedTuple):
    """The cost of a program on one chip, as XLA counts it.

    The body of a loop counts once, except that of the loop over parts of the batch
    (`train.grad_accumulation_steps`) and over the members of a population.

    Attributes:
      memory: the memory while the program runs.
      flops: the floating-point operations.
      bytes: the size of the operands and results of all operations. It exceeds the traffic with
        the chip's memory, because some operands and results stay in registers and caches. None
        on a GPU, for which XLA does not count it without a device.
      collectives: the exchange between chips, by kind.
    """

    memory: Memory
    flops: float
    bytes: float | None
    collectives: dict[str, hlo.Collective]


class Roofline(NamedTuple):
    """Lower bounds of the time of a step, in seconds.

    Attributes:
      arithmetic: the time of the arithmetic at the chip's peak.
      traffic: the time of the memory traffic at the chip's bandwidth; 0 if it is not known.
    """

    arithmetic: float
    traffic: float

    @property
    def step(self) -> float:
        """The larger of the two bounds."""
        return max(self.arithmetic, self.traffic)


def roofline(costs: Costs, chip: hardware.Chip) -> Roofline:
    """Returns the bounds of a step on one chip; omits communication."""
    return Roofline(costs.flops / chip.flops, (costs.bytes or 0) / chip.bandwidth)


def measure(
    lowered: Any, *, repeats: int = 1, flops: float | None = None, options: Any = None
) -> tuple[Costs | None, str]:
    """Compiles a lowered program and reads its cost.

    Args:
      lowered: the lowered program.
      repeats: how often the body of its loop over parts or members runs.
      flops: XLA's count of the floating-point operations if the compiler gives none.
      options: options of the compiler.

    Returns:
      The cost and an empty string; or None and the reason why the program does not fit.
    """
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses a program that is too large. Here this is a result, not a failure.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, first_line(error)
    sizes, work = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    operations, traffic = work.get("flops", flops or 0.0), work.get("bytes accessed")
    # XLA counts the body of the loop once.
    return Costs(
        memory,
        operations * repeats,
        traffic and traffic * repeats,
        hlo.collectives(compiled.as_text()),
    ), ""


class Program(NamedTuple):
    """A program of a run.

    Attributes:
      title: what it computes.
      lower: a mesh → the program for its devices.
      sizes: the bytes of the arguments on one chip, by name.
      beside: what the chip also holds while the program runs.
      images: the number of images in a step or call, on all chips together; 0 if the loops in
        the program have no fixed length, so that its time cannot be estimated.
      shares: the number of chips that share the work of the lowered program.
      repeats: see `measure`.
    """

    title: str
    lower: Callable[[Mesh], Any]
    sizes: Sizes
    beside: Sizes = types.MappingProxyType({})
    images: int = 0
    shares: int = 1
    repeats: int = 1


class Report(NamedTuple):
    """The cost of a program and the figures of the chip.

    Attributes:
      program: the program.
      chip: the figures of the chip.
      costs: the cost, or None if the compiler could not place the program in the memory.
      complaint: the compiler's message in this case.
    """

    program: Program
    chip: hardware.Chip
    costs: Costs | None
    complaint: str = ""

    @property
    def sizes(self) -> Sizes:
        """Everything in the memory of a chip while the program runs, in bytes."""
        sizes = {**self.program.sizes, **self.program.beside}
        if self.costs is None:
            return sizes
        memory = self.costs.memory
        # Arrays are padded to whole tiles of the memory. An argument that is not used is left out
        # of the program, but not out of the memory.
        padding = memory.arguments - sum(self.program.sizes.values())
        return {
            **sizes,
            "padding, keys": max(0, padding),
            "results": memory.outputs - memory.aliased,
            "temporaries": memory.temporaries,
            "code": memory.code,
        }

    @property
    def total(self) -> int:
        """The memory that the chip needs while the program runs, in bytes."""
        return sum(self.sizes.values())

    @property
    def fits(self) -> bool:
        """True if the chip's memory is large enough for the program."""
        return self.costs is not None and self.total <= self.chip.memory


def format_report(report: Report) -> str:
    """Formats a report as a few lines of text."""
    limit = f"{report.chip.memory / GIB:.2f} GiB"
    lines = [report.program.title]
    if report.costs is None:
        lines.append(f"  memory a chip   of {limit}: does not fit; {report.complaint}")
    else:
        verdict = "fits" if report.fits else "does not fit"
        lines.append(f"  memory a chip   {report.total / GIB:.2f} GiB of {limit}: {verdict}")
    lines += [
        f"    {name:21s} {size / MIB:9.1f} MiB" for name, size in report.sizes.items() if size
    ]
    if report.costs is None:
        return "\n".join(lines)
    traffic = report.costs.bytes
    accessed = (
        "memory traffic not counted" if traffic is None else f"{traffic / 1e9:.2f} GB accessed"
    )
    loops = "" if report.program.images else "; the body of a loop counted once"
    kinds = [
        f"{kind}: {collective.count} ({collective.bytes / MIB:.1f} MiB)"
        for kind, collective in sorted(report.costs.collectives.items())
    ]
    lines += [
        f"  work a chip     {report.costs.flops / 1e9:.4g} GFLOP, {accessed}{loops}",
        f"  collectives     {', '.join(kinds) or 'none'}",
    ]
    if report.program.images:
        time = roofline(report.costs, report.chip)
        memory = "" if traffic is None else f", memory {time.traffic * 1e3:.2f} ms"
        lines.append(
            f"  roofline        arithmetic {time.arithmetic * 1e3:.2f} ms{memory}: "
            f"{time.step * 1e3:.2f} ms, {report.program.images / time.step:.0f} images/s"
        )
    return "\n".join(lines)
