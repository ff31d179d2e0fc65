"""The Triton kernels of HSTU attention compiled to machine code for GPUs that are not here.

    python -m pallas_kernels.hstu_attention.compile_check

prints, for each case and compute capability: shared memory, registers, spilled bytes and the
tensor core instructions. Needs the stand-alone compiler (`pip install -e '.[kernels-check]'`) and
no GPU. It says nothing about speed.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hstu_attention import pallas_triton
from pallas_kernels.hstu_attention.layout import from_lengths
from pallas_kernels.hstu_attention.mask import MaskRule

# The device kind that stands for each compute capability.
KINDS = {80: "NVIDIA A100-SXM4-80GB", 89: "NVIDIA L4", 90: "NVIDIA H100 80GB HBM3"}
TARGET_NAME = "__gpu$xla.gpu.triton"


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """Sizes of one case; two rows and two heads, the second row half as long.

    Args:
        dtype: of q, k and v.
        qk_dim: K.
        v_dim: V.
        row_len: L.
        rule: the mask.
    """

    dtype: str
    qk_dim: int
    v_dim: int
    row_len: int = 4102
    rule: MaskRule = MaskRule(contextual_len=6)


CASES = (
    CompileCase("bfloat16", 32, 32),
    CompileCase("bfloat16", 64, 64),
    CompileCase("bfloat16", 128, 128),
    CompileCase("bfloat16", 256, 256),
    CompileCase("float16", 128, 128),
    CompileCase("bfloat16", 64, 128),
    CompileCase("bfloat16", 50, 96),
    CompileCase("bfloat16", 64, 64, rule=MaskRule(contextual_len=6, max_attn_len=256)),
    CompileCase("bfloat16", 128, 128, rule=MaskRule(sla_k1=256, sla_k2=64)),
    CompileCase("bfloat16", 128, 128, row_len=21),
    CompileCase("float32", 32, 32),
    CompileCase("float32", 64, 64),
    CompileCase("float32", 128, 128),
    CompileCase("float32", 256, 256),
)


@dataclasses.dataclass(frozen=True)
class LoweredKernel:
    """One kernel of a lowered program, in Triton's intermediate form (bytecode)."""

    name: str
    bytecode: bytes
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel.

    Args:
        name: of the kernel.
        shared_bytes: shared memory of one program.
        registers: of one thread; the hardware has 255.
        stack_bytes: of one thread: registers that were spilled to memory.
        num_mma: tensor core instructions of Ampere (mma.sync).
        num_wgmma: tensor core instructions of Hopper (wgmma).
    """

    name: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    num_mma: int
    num_wgmma: int


def lower(case: CompileCase, capability: int) -> jax.stages.Lowered:
    """Forward and backward of a case, lowered for a device of that capability."""
    layout = from_lengths(
        np.array([case.row_len, case.row_len // 2], np.int32),
        row_len=case.row_len,
        rule=case.rule,
    )

    def run(q, k, v, g, layout):
        attend = functools.partial(
            pallas_triton.hstu_attention, layout=layout, rule=case.rule, alpha=0.1, divisor=4096.0
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    shape = (2, case.row_len, 2)
    q, v = (jax.ShapeDtypeStruct((*shape, w), case.dtype) for w in (case.qk_dim, case.v_dim))
    with jax.sharding.use_abstract_mesh(abstract_gpu(KINDS[capability])):
        return jax.jit(run).trace(q, q, v, v, layout).lower(lowering_platforms=("cuda",))


def abstract_gpu(kind: str) -> jax.sharding.AbstractMesh:
    """A mesh that only names a GPU: programs lowered under it are for that kind of device."""
    device = jax.sharding.AbstractDevice(kind, None, "gpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def kernels_of(lowered: jax.stages.Lowered) -> list[LoweredKernel]:
    """The Triton kernels of a lowered program, in program order."""
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            if operation.attributes["call_target_name"].value == TARGET_NAME:
                config = operation.attributes["mhlo.backend_config"]
                code = config["ir"]
                # Bytes that are not text: the newer bindings have a name of their own for them.
                bytecode = getattr(code, "value_bytes", None) or code.value
                found.append(
                    LoweredKernel(
                        config["name"].value,
                        bytecode,
                        config["num_warps"].value,
                        config["num_stages"].value,
                    )
                )
        return advance

    # The bindings of MLIR have no public address in JAX.
    from jaxlib.mlir import ir

    advance = ir.WalkResult.ADVANCE
    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def compile_kernel(kernel: LoweredKernel, capability: int) -> CompiledKernel:
    """Compiles one kernel to machine code.

    Raises:
        ImportError: the stand-alone compiler is not installed.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ttir")
        source.write_text(_as_text(kernel.bytecode), "utf-8")
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(str(source), target=target, options=options)
        code = pathlib.Path(folder, "kernel.cubin")
        code.write_bytes(compiled.asm["cubin"])
        tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(code)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return CompiledKernel(
        name=kernel.name,
        shared_bytes=int(compiled.metadata.shared),
        registers=int(registers),
        stack_bytes=int(stack),
        num_mma=compiled.asm["ptx"].count("mma.sync"),
        num_wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
    )


def _as_text(bytecode):
    """Bytecode of JAX's copy of Triton as text, which the stand-alone compiler reads."""
    from jax._src.pallas.triton.lowering import _new_ir_context
    from jaxlib.mlir import ir

    with _new_ir_context(), ir.Location.unknown():
        return str(ir.Module.parse(bytecode))


def check(case: CompileCase, capability: int) -> list[CompiledKernel]:
    """Lowers and compiles the three kernels of a case."""
    return [compile_kernel(kernel, capability) for kernel in kernels_of(lower(case, capability))]


def _line(case, capability):
    """One line of the table; three figures are those of forward, dq, dk with dv."""
    compiled = check(case, capability)
    tiles = pallas_triton.choose_tiles(
        divmod(capability, 10),
        jnp.dtype(case.dtype),
        qk_dim=case.qk_dim,
        v_dim=case.v_dim,
        row_len=case.row_len,
    )
    mask = " window" if case.rule.max_attn_len else " SLA" if case.rule.is_semi_local else ""
    sizes = (f"{t.block_q}x{t.block_k}" for t in (tiles.forward, tiles.dq, tiles.dkv))
    columns = (
        [f"{case.dtype} {case.qk_dim}/{case.v_dim} L={case.row_len}{mask}"],
        [f"sm{capability}"],
        sizes,
        (f"{kernel.shared_bytes / 1024:.0f}" for kernel in compiled),
        (str(kernel.registers) for kernel in compiled),
        (str(kernel.stack_bytes) for kernel in compiled),
        (str(kernel.num_mma) for kernel in compiled),
        (str(kernel.num_wgmma) for kernel in compiled),
    )
    return "| " + " | ".join(", ".join(column) for column in columns) + " |"


def main() -> None:
    """Prints the table as Markdown."""
    print(f"jax {jax.__version__}; three figures: forward, dq, dk and dv")
    print(
        "| case | device | queries x keys | shared KiB | registers | spilled bytes | mma | wgmma |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for capability in KINDS:
            print(_line(case, capability), flush=True)


if __name__ == "__main__":
    main()
