"""Compile every kernel at every tile it may be launched with, for H100 and A100, without a GPU: `python -m tests.kernels.compiled [pair_lse …]`.

Prints one JSON line a kernel and tile: shared memory (bytes), registers, bytes spilled to the stack. Run without TRITON_INTERPRET: the interpreter accepts what
the compiler refuses.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Job = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]  # name, kernel, pointer and number types, constants, options
SHORT = {2: "bf16", 4: "fp32"}


def _types(kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    return {name: "constexpr" if name in constants else given.get(name, "i32") for name in kernel.arg_names}


def pair_lse() -> Iterator[Job]:
    from common.kernels import pair_lse as p
    from common.kernels._triton import tl

    for size, grouped, both, d in itertools.product((2, 4), (False, True), (False, True), (64, 128, 512)):
        rows, columns, chunk, warps, stages = p.FORWARD_TILES[size]
        kernel = p._forward_kernel
        types = dict.fromkeys(("query", "key"), f"*{SHORT[size]}") | dict.fromkeys(("query_group", "key_group"), "*i32")
        types |= dict.fromkeys(("scale", "row_max", "row_sum", "column_max", "column_sum"), "*fp32")
        constants = {"D": d, "ROWS": rows, "COLUMNS": columns, "CHUNK": min(chunk, d), "GROUPED": grouped, "BOTH": both}
        constants |= {"UP": False, "ACC": tl.float32, "PRECISION": "tf32x3"}
        if grouped != both or (d != 128 and not both):
            continue
        yield f"forward {SHORT[size]} D{d}", kernel, _types(kernel, types, constants), constants, {"num_warps": warps, "num_stages": stages}
    for size, d, (by_one, by_other) in itertools.product((2, 4), (64, 128, 256, 512), ((True, True), (False, True))):
        rows, columns, chunk, warps, stages = p.BACKWARD_TILES[size][max(64, d)]
        kernel = p._backward_kernel
        types = dict.fromkeys(("one", "other"), f"*{SHORT[size]}") | dict.fromkeys(("one_group", "other_group"), "*i32")
        types |= dict.fromkeys(("scale", "one_lse", "one_grad", "other_lse", "other_grad", "out"), "*fp32")
        constants = {
            "D": d,
            "WIDTH": max(16, d),
            "ROWS": rows,
            "COLUMNS": columns,
            "CHUNK": min(chunk, max(16, d)),
            "GROUPED": True,
            "BY_ONE": by_one,
            "BY_OTHER": by_other,
        }
        constants |= {"UP": False, "ACC": tl.float32, "PRECISION": "tf32x3"}
        if d != 128 and not (by_one and by_other):
            continue
        yield (
            f"backward {SHORT[size]} D{d}",
            kernel,
            _types(kernel, types, constants),
            constants,
            {"num_warps": warps, "num_stages": stages},
        )


def patch_loss() -> Iterator[Job]:
    from common.kernels import patch_loss as p
    from common.kernels._triton import tl

    kernel = p._kernel
    every = {
        "MEAN": False,
        "STD": False,
        "BYTES": False,
        "DIFFERENCE": False,
        "SPLIT": 0,
        "UP": False,
        "UP_IMAGE": False,
        "ACC": tl.float32,
    }
    every |= {"EPS": 1e-6, "EPS_INSIDE": True, "CHANNEL_LAST": True, "BY_PATCH": True, "BY_CHANNEL": False}
    hicmae = {"MEAN": True, "STD": True, "DIFFERENCE": True, "BY_PATCH": False, "BY_CHANNEL": True, "EPS_INSIDE": False}
    for what, (channels, frames, side), options, pixels in (
        ("MAE", (3, 1, 16), {}, "fp32"),
        ("MAE bytes", (3, 1, 14), {"BYTES": True}, "u8"),
        ("HiCMAE", (3, 2, 16), hicmae, "fp32"),
        ("CROMA", (14, 1, 8), {"CHANNEL_LAST": False, "SPLIT": 768}, "fp32"),
        ("widest", (4, 4, 16), {}, "fp32"),
    ):
        for backward in (False, True) if what in ("HiCMAE", "CROMA") else (True,):
            values = frames * side**2
            constants = every | options | {"C": channels, "FRAMES": frames, "DOWN": side, "RIGHT": side, "BACKWARD": backward}
            constants |= {"CS": 1 << (channels - 1).bit_length(), "VS": 1 << (values - 1).bit_length()}
            types = {"pred": "*bf16", "image": f"*{pixels}", "index": "*i64"} | dict.fromkeys(("mean", "std", "grad", "out"), "*fp32")
            warps = p.WARPS[0] if constants["CS"] * constants["VS"] <= 2048 else p.WARPS[1]
            yield f"patch loss {what}", kernel, _types(kernel, types, constants), constants, {"num_warps": warps}


def points() -> Iterator[Job]:
    from common.kernels import points as p
    from common.kernels._triton import tl

    for size in (1024, 8192):
        kernel, constants = p._farthest_kernel, {"SIZE": size}
        options = {"num_warps": p.farthest_warps(size), "enable_fp_fusion": False}
        yield f"farthest points {size}", kernel, _types(kernel, {"points": "*fp32", "out": "*i32"}, constants), constants, options
        kernel = p._nearest_kernel
        types = {"index": "*i32"} | dict.fromkeys(("points", "centres", "distance", "relative"), "*fp32")
        options = {"num_warps": p.nearest_warps(size), "enable_fp_fusion": False}
        yield f"neighbours {size}", kernel, _types(kernel, types, constants), constants, options
    for size in (32, 64):
        constants = {"NS": size, "MS": size, "ACC": tl.float32}
        which = {"which_b": "*i32", "which_a": "*i32"}
        for kernel in (p._pairs_kernel, p._pairs_backward_kernel):
            types = dict.fromkeys(("a", "b", "to_b", "to_a", "grad_b", "grad_a", "out_a", "out_b"), "*fp32") | which
            types = {name: types.get(name, "i32") for name in kernel.arg_names}
            yield (
                f"{kernel.fn.__name__} {size}",
                kernel,
                _types(kernel, types, constants),
                constants,
                {"num_warps": p.pair_warps(size), "enable_fp_fusion": False},
            )


def topk_attention() -> Iterator[Job]:
    from common.kernels import topk_attention as t
    from common.kernels._triton import tl

    numbers = {"query", "key", "value", "grad"}
    sums = {"out", "lse", "along", "out_key", "out_value"}
    for size, width in ((2, 32), (2, 64), (2, 128), (4, 16), (4, 32), (4, 64)):
        same = {"SCALE": width**-0.5, "D": width, "WIDTH": width, "UP": False, "ACC": tl.float32, "PRECISION": "tf32x3"}
        pointers = (
            dict.fromkeys(numbers, f"*{SHORT[size]}") | dict.fromkeys(sums, "*fp32") | dict.fromkeys(("owner", "words", "hits"), "*i32")
        )
        for columns, (rows, warps) in t.FORWARD_TILES[size].items():
            if width < 64 and columns != 64:  # the longer ones are compiled at the larger widths
                continue
            constants = same | {"ROWS": rows, "COLUMNS": columns, "OWNED": True, "RANK": tl.int32, "BITS": 32, "LOWEST": -(2**31)}
            kernel = t._forward_kernel
            types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
            yield f"top-k forward {SHORT[size]}", kernel, _types(kernel, types, constants), constants, {"num_warps": warps}
        own, other, warps, stages = t.BACKWARD_TILES[size][width]
        options = {"num_warps": warps, "num_stages": stages}
        for kernel, (rows, columns) in ((t._query_kernel, (own, other)), (t._key_kernel, (other, own))):
            constants = same | {"ROWS": rows, "COLUMNS": columns, "WORDS": 8}
            types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
            yield f"top-k {kernel.fn.__name__} {SHORT[size]}", kernel, _types(kernel, types, constants), constants, options


def compile_job(job: Job, capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, types, constants, options = job
    order = list(types)
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(order) if types[arg].startswith("*")}
    source = ASTSource(kernel, types, {(order.index(arg),): value for arg, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True} | options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "kernel": name,
        "capability": capability,
        "shared": made.metadata.shared,
        "registers": int(registers),
        "spilled": int(stack),
        **{k: str(v) for k, v in constants.items()},
        **options,
    }


FILES = {"pair_lse": pair_lse, "patch_loss": patch_loss, "points": points, "topk_attention": topk_attention}


if __name__ == "__main__":
    for which in sys.argv[1:] or FILES:
        for job in FILES[which]():
            for capability in (90, 80) if which in ("pair_lse", "topk_attention") else (90,):  # the others use a fraction of either device
                print(json.dumps(compile_job(job, capability)), flush=True)
