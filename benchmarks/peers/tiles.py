"""Tiles of SGLang's Triton kernel: its default, the tuned files of the wheels of SGLang and vLLM, and a sweep.

A file is JSON, from T to a tile; the T nearest to a call's is taken. The sweep's files have the same format and name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hybrid_moe.device import DeviceKey
from hybrid_moe.files import write_whole
from hybrid_moe.problem import MoEProblem

from .sglang import BLOCK, package_dir

Tile = dict[str, int]
KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
RESULTS = Path(__file__).parents[1] / "results"
# Where a GPU has no file, those of its nearest relation are taken: in favour of the peer, which would run its default.
RELATIONS = {"NVIDIA_H100_80GB_HBM3": ("NVIDIA_H200",)}


def tile(m: int, n: int, group: int, warps: int, stages: int) -> Tile:
    """One with the depth of the scales' blocks."""
    return dict(zip(KEYS, (m, n, BLOCK, group, warps, stages), strict=True))


DEFAULT = tile(64, BLOCK, 32, 4, 3)
FEW_ROWS = (
    tile(16, 64, 1, 4, 4),
    tile(16, 64, 1, 4, 5),
    tile(16, 128, 1, 4, 3),
    tile(16, 128, 1, 4, 4),
    tile(16, 128, 16, 4, 5),
    tile(32, 128, 1, 4, 4),
    tile(64, 128, 1, 4, 3),
    tile(64, 128, 1, 4, 4),
)
MANY_ROWS = (
    tile(32, 128, 16, 4, 3),
    tile(64, 128, 1, 4, 4),
    tile(64, 128, 16, 4, 4),
    tile(64, 128, 64, 4, 3),
    tile(128, 64, 16, 4, 4),
    tile(128, 128, 16, 8, 3),
    DEFAULT,
)


def worth_trying(problem: MoEProblem, num_tokens: int) -> tuple[Tile, ...]:
    """The sweep at this T, by the mean rows of an expert."""
    rows = num_tokens * problem.top_k / problem.num_experts
    return FEW_ROWS if rows <= 8 else (*FEW_ROWS[3:-1], *MANY_ROWS) if rows <= 32 else MANY_ROWS


def named(name: str, problem: MoEProblem, num_tokens: int) -> Tile | None:
    """The tile that a name stands for, ``None`` if there is none; the names are in `sglang_triton`."""
    if name == "default":
        return DEFAULT
    found = load(tuned_path(problem)) if name == "tuned" else shipped(name, problem)
    return found[min(found, key=lambda t: abs(t - num_tokens))] if found else None


def file_name(problem: MoEProblem, gpu: str | None = None, *, space: str = " ") -> str:
    """As SGLang has it; vLLM has no space in it."""
    return (
        f"E={problem.num_local_experts},N={problem.intermediate_size},device_name={gpu or gpu_name()},dtype=fp8_w8a8,"
        f"block_shape=[{BLOCK},{space}{BLOCK}].json"
    )


def gpu_name() -> str:
    """The product name, as files have it."""
    return torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"


@functools.cache
def shipped(package: str, problem: MoEProblem, gpu: str | None = None) -> dict[int, Tile] | None:
    """What the wheel of ``sglang`` or ``vllm`` has for the layer on this GPU, or else on a relation of it.

    SGLang has a folder for each Triton release; the newest that has the file counts.
    """
    root, gpu = package_dir(package), gpu or gpu_name()
    if root is None:
        return None
    if package == "vllm":
        folders = [root / "model_executor" / "layers" / "fused_moe" / "configs"]
    else:
        configs = root / "srt" / "layers" / "moe" / "moe_runner" / "triton_utils" / "configs"
        folders = sorted(configs.glob("triton_*"), key=lambda p: [int(n) for n in p.name.split("_")[1:]], reverse=True)
    for one in (gpu, *RELATIONS.get(gpu, ())):
        for folder in folders:
            path = folder / file_name(problem, one, space="" if package == "vllm" else " ")
            if path.is_file():
                return load(path)
    return None


def load(path: Path) -> dict[int, Tile] | None:
    """Tiles by T; ``None`` if there is no such file.

    A tile deeper than a scale's block is cut to it, as vLLM does: the kernel has one scale for its whole depth.
    """
    if not path.is_file():
        return None
    return {
        int(tokens): {key: min(found[key], BLOCK) if key == "BLOCK_SIZE_K" else found[key] for key in KEYS}
        for tokens, found in json.loads(path.read_text()).items()
        if tokens.isdigit()
    }


def tuned_path(problem: MoEProblem) -> Path:
    """Where the sweep's tiles of this GPU are kept."""
    device = DeviceKey.of("cuda" if torch.cuda.is_available() else "cpu")
    return RESULTS / device.name / "sglang_tiles" / file_name(problem)


def keep(path: Path, num_tokens: int, best: Tile) -> None:
    """Add one T to a file of tiles."""
    found = (load(path) or {}) | {num_tokens: best}
    write_whole(path, (json.dumps({str(t): found[t] for t in sorted(found)}, indent=1) + "\n").encode())


def fastest(tiles: Sequence[Tile], time: Callable[[Tile], float | None]) -> Tile | None:
    """The tile with the least time; ``time`` gives ``None`` for one that is wrong or doesn't launch."""
    times = [(taken, number) for number, one in enumerate(tiles) if (taken := time(one)) is not None]
    return tiles[min(times)[1]] if times else None
