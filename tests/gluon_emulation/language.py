"""The operations of `triton.language` and of Gluon's that kernels use, each on the CPU; layouts mean nothing here."""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

from . import schedule
from .memory import POISON, Allocation, Descriptor, Pointer, Shared, Store, gather, places
from .schedule import current_task
from .values import (
    BITS,
    EmulationError,
    Scalar,
    Tensor,
    common,
    convert,
    data_of,
    dtype_of,
    made,
    tensor_of,
    torch_dtype,
)

# Values


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    return Tensor(torch.arange(start, end), torch.int32)


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    dtype = torch_dtype(dtype)
    held = torch.int64 if dtype in BITS else dtype
    return Tensor(torch.full(tuple(shape), data_of(value), dtype=held), dtype)


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype)


def where(condition: Any, x: Any, y: Any) -> Any:
    dtype = common(x, y)
    if dtype_of(x) is None and dtype_of(y) is None and not isinstance(condition, Tensor):
        return x if condition else y
    chosen = torch.as_tensor(data_of(condition)) != 0
    return made(torch.where(chosen, tensor_of(x, dtype), tensor_of(y, dtype)), dtype)


def _least_or_most(drop_nan: Any, keep_nan: Any, of_integers: Any) -> Callable[..., Any]:
    def choose(x: Any, y: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Any:
        if dtype_of(x) is None and dtype_of(y) is None:
            return of_integers(x, y)
        if common(x, y).is_floating_point:
            function = drop_nan if propagate_nan == tl.PropagateNan.NONE else keep_nan
        else:
            function = keep_nan
        dtype = common(x, y)
        return made(function(tensor_of(x, dtype), tensor_of(y, dtype)), dtype)

    return choose


minimum = _least_or_most(torch.fmin, torch.minimum, min)
maximum = _least_or_most(torch.fmax, torch.maximum, max)


def clamp(x: Any, low: Any, high: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Any:
    return minimum(maximum(x, low, propagate_nan), high, propagate_nan)


def absolute(x: Any) -> Any:
    return made(torch.abs(x.data), x.dtype)


def exp(x: Any) -> Any:
    return made(torch.exp(x.data), x.dtype)


def cdiv(x: Any, y: Any) -> Any:
    return (x + (y - 1)) // y


def cast(x: Any, dtype: Any, bitcast: bool = False) -> Any:
    return convert(x if dtype_of(x) is not None else Scalar(x), torch_dtype(dtype), bitcast)


def sum_of(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Any:
    return made(_over(torch.sum, x, axis, keep_dims), torch.int32 if x.dtype == torch.bool else x.dtype)


def _over(function: Any, x: Tensor, axis: int | None, keep_dims: bool) -> torch.Tensor:
    return function(x.data) if axis is None else function(x.data, dim=axis, keepdim=keep_dims)


def max_of(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Any:
    if not x.dtype.is_floating_point:
        return made(_over(torch.amax, x, axis, keep_dims), x.dtype)
    return reduce(x, axis, maximum, keep_dims)


def min_of(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Any:
    if not x.dtype.is_floating_point:
        return made(_over(torch.amin, x, axis, keep_dims), x.dtype)
    return reduce(x, axis, minimum, keep_dims)


def reduce(x: Tensor, axis: int | None, combine_fn: Any, keep_dims: bool = False) -> Any:
    """By halves, of a length that is a power of two."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    data = x.data
    while (length := data.shape[axis]) > 1:
        first, second = (Tensor(part, x.dtype) for part in data.split(length // 2, dim=axis))
        data = combine_fn(first, second).data
    return made(data if keep_dims else data.squeeze(axis), x.dtype)


def associative_scan(x: Tensor, axis: int, combine_fn: Any, reverse: bool = False) -> Tensor:
    assert not reverse
    data, distance = x.data, 1
    while distance < (length := data.shape[axis]):
        ahead = Tensor(data.narrow(axis, 0, length - distance), x.dtype)
        here = Tensor(data.narrow(axis, distance, length - distance), x.dtype)
        data = torch.cat([data.narrow(axis, 0, distance), combine_fn(ahead, here).data], dim=axis)
        distance *= 2
    return made(data, x.dtype)


def cumsum(x: Tensor, axis: int = 0) -> Tensor:
    return made(torch.cumsum(x.data, dim=axis), x.dtype)


def dot(a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    product = a.data.float() @ b.data.float()
    return Tensor(product if acc is None else acc.data + product)


def trans(x: Tensor) -> Tensor:
    return Tensor(x.data.mT, x.dtype)


def convert_layout(x: Tensor, layout: Any = None, assert_trivial: bool = False) -> Tensor:
    return x


def loop(*bounds: int, **options: Any) -> Any:
    """Of a loop that isn't unrolled, whose variable is an int32."""
    return map(Scalar, range(*map(int, bounds)))


def static_range(*bounds: int) -> range:
    return range(*bounds)


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise EmulationError(f"static_assert: {message}")


# Global memory


def program_id(axis: int) -> Scalar:
    return Scalar((*current_task().program.index, 0, 0)[axis])


def num_programs(axis: int) -> Scalar:
    return Scalar(current_task().program.kernel.grid[axis])


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "", volatile: bool = False, **_: Any
) -> Any:
    task = current_task()
    task.polled = None
    # .cg and .cv go past the first-level cache, which may hold what was there before.
    seen = None if cache_modifier in (".cg", ".cv") or volatile else task.seen
    return made(gather(pointer, mask, other, seen, task.program.number), pointer.region.dtype)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    task = current_task()
    task.polled = None
    offsets, wanted = places(pointer, mask)
    region = pointer.region
    values = convert(value, region.dtype)
    values = values.data if isinstance(values, Tensor) else torch.tensor(values, dtype=region.dtype)
    if values.shape != offsets.shape:
        offsets, wanted, values = torch.broadcast_tensors(offsets, wanted, values)
    values = values.to(region.dtype)[wanted]
    if values.numel():
        task.stores.append(Store(region, region.index(offsets[wanted]), values, task.program))


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str | None = None, scope: Any = None) -> Any:
    task, region = current_task(), pointer.region
    offsets, wanted = places(pointer, mask)
    polled = task.polled
    task.pause(f"atomic {region.name}" + ("" if offsets.dim() else f"[{int(offsets)}]"))
    if sem in (None, "release", "acq_rel"):
        task.publish()
    memory, view = task.machine.memory, region.storage.view(region.dtype)
    added = torch.as_tensor(data_of(value)).to(region.dtype).expand(offsets.shape)
    before = torch.full(offsets.shape, POISON, dtype=region.dtype)
    for place in (place for place in zip(*torch.where(wanted), strict=True)) if offsets.dim() else [()]:
        if not bool(wanted[place]):
            continue
        index = region.index(offsets[place].reshape(1))
        if not added[place]:
            before[place] = view[index][0]
            continue
        memory.now += 1
        before[place] = view[index][0]
        region.storage.write(region, index, view[index] + added[place], memory.now, task.program, False)
    if sem in (None, "acquire", "acq_rel"):
        task.seen = memory.now
    if not offsets.dim() and not added:
        _end_of_polling(task, pointer, int(before), polled)
    return made(before, region.dtype)


def _end_of_polling(task: schedule.Task, pointer: Pointer, value: int, polled: Any) -> None:
    """Who looks at the same number three times, and at nothing else between, waits until it has changed."""
    region, place = pointer.region, int(pointer.offset)
    looked = (region.storage, region.dtype, region.first + place, value)
    times = polled[1] + 1 if polled and polled[0] == looked else 1
    if times > 2:  # one wait may follow another
        view = region.storage.view(region.dtype)
        task.wait(lambda: int(view[region.first + place]) != value, f"{region.name}[{place}], which stays {value}")
    task.polled = looked, times


def debug_barrier() -> None:
    for pending in current_task().stores:
        pending.joined = True


def inline_asm_elementwise(asm: str, *_: Any, **__: Any) -> None:
    task = current_task()
    if asm.startswith("fence.proxy.async.global;"):
        task.seen_by_tma = task.seen
    elif not asm.startswith("cp.async.bulk.prefetch.L2"):
        raise NotImplementedError(f"assembly {asm}")


def gdc_wait() -> None:
    task = current_task()
    task.machine.wait_for_previous_kernel(task)


def gdc_launch_dependents() -> None:
    task = current_task()
    task.machine.let_next_start(task.program)


class TileDescriptor(Descriptor):
    """Of Triton: it loads into registers."""

    def load(self, start: Sequence[int]) -> Tensor:
        return Tensor(self.read(start, current_task().seen_by_tma))


# Shared memory and barriers


def _source_of_call() -> str:
    """What the kernel's source calls the result of the call that is under way: the left side of the assignment."""
    frame = sys._getframe(2)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return line.split("=")[0].strip() if "=" in line.split("(")[0] else f"line {frame.f_lineno}"


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Memory:
    memory = Memory(Allocation(_source_of_call(), torch_dtype(dtype), shape))
    if value is not None:
        memory.store(value)
    return memory


class Memory(Shared):
    """Shared memory with the kernel's own stores and loads."""

    def _view(self, function: Any, path: str) -> Memory:
        return Memory(self.allocation, [function(view) for view in self.views], self._path + path)

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        """In another shape."""
        assert torch_dtype(dtype) == self.dtype
        return self._view(lambda view: view.view(*map(int, shape)), "")

    def load(self, layout: Any = None) -> Any:
        current_task().pause("load")
        return super().load(layout)

    def store(self, value: Any) -> None:
        task = current_task()
        task.pause("store")
        self.check_writable(task)
        task.machine.memory.now += 1
        self.data.copy_(tensor_of(value, value.dtype))
        self.stored_at.fill_(task.machine.memory.now)


def barrier_init(barrier: Memory, count: int) -> None:
    barrier.make_barrier(count)


def barrier_arrive(barrier: Memory, *, count: int = 1, pred: Any = True) -> None:
    task = current_task()
    task.pause("arrive")
    if pred:
        barrier.barrier.arrive(count)


def barrier_expect(barrier: Memory, bytes_per_cta: int, pred: Any = True) -> None:
    current_task().pause("arrive")
    if pred:
        barrier.barrier.expect(bytes_per_cta)


def barrier_wait(barrier: Memory, phase: int, pred: Any = True, deps: Any = ()) -> None:
    task, found = current_task(), barrier.barrier
    task.polled = None
    if pred:
        task.wait(lambda: found.has_passed(int(phase)), _Reason(int(phase), found))


class _Reason:
    """Said when it is asked for, with the barrier as it is then."""

    def __init__(self, phase: int, barrier: Any) -> None:
        self.phase, self.barrier = phase, barrier

    def __str__(self) -> str:
        return f"the end of a phase of parity {self.phase} of {self.barrier}"


def fence_async_shared(cluster: bool = False) -> None:
    task = current_task()
    task.fenced = task.machine.memory.now


def load_tile(
    descriptor: Descriptor, start: Sequence[int], barrier: Memory, result: Memory, pred: Any = True, **_: Any
) -> None:
    task = current_task()
    task.pause("copy")
    if pred:
        schedule.copy_tile(task, descriptor, [int(x) for x in start], barrier.barrier, result)


def load_rows(result: Memory, pointer: Pointer, mask: Any = None, **_: Any) -> None:
    task = current_task()
    task.pause("copy")
    schedule.copy_rows(task, result, pointer, mask)


def arrive_after_rows(barrier: Memory, increment_count: bool = True) -> None:
    task = current_task()
    task.pause("arrive")
    schedule.arrive_after_rows(task, barrier.barrier, increment_count)


# Products of warp groups


class Product:
    """One under way, which reads its operands until it has been waited for."""

    def __init__(self, a: Any, b: Memory, accumulator: Any, use_acc: Any) -> None:
        task = current_task()
        self.operands, self._accumulator, self._use_acc = [a, b], accumulator, bool(use_acc)
        self.result: Tensor | None = None
        if a.shape[0] % 64 or a.shape[1] != b.shape[0] or accumulator.shape != [a.shape[0], b.shape[1]]:
            raise EmulationError(f"a product of {a.shape} by {b.shape} into {accumulator.shape}")
        for operand in self._shared():
            if bool(operand.writing.any()):
                raise EmulationError(f"{task} multiplies {operand}, which an async copy is still writing")
            if bool((operand.stored_at > task.fenced).any()):
                raise EmulationError(f"{task} multiplies {operand} without a fence since it was stored")
            operand.reading += 1

    @property
    def shape(self) -> list[int]:
        return [self.operands[0].shape[0], self.operands[1].shape[1]]

    def _shared(self) -> list[Memory]:
        return [operand for operand in self.operands if isinstance(operand, Memory)]

    def complete(self) -> Tensor:
        if self.result is None:
            a, b = (operand.data.float() for operand in self.operands)
            product = a @ b
            if self._use_acc:
                previous = self._accumulator
                product += (previous.complete() if isinstance(previous, Product) else previous).data
            self.result = Tensor(product)
            for operand in self._shared():
                operand.reading -= 1
        return self.result


def warpgroup_mma(a: Any, b: Memory, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any) -> Any:
    task = current_task()
    product = Product(a, b, acc, use_acc)
    if not is_async:
        return product.complete()
    task.products.append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    task = current_task()
    task.pause("product")
    while len(task.products) > num_outstanding:
        task.products.pop(0).complete()
    results = [x.result if isinstance(x, Product) and x.result is not None else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def warp_specialize(
    functions_and_args: Sequence[tuple[Any, Sequence[Any]]], worker_num_warps: Sequence[int], *registers: Any, **_: Any
) -> None:
    task = current_task()
    (function, args), *workers = functions_and_args
    assert len(workers) == len(worker_num_warps)
    tasks = []
    for number, ((work, work_args), warps) in enumerate(zip(workers, worker_num_warps, strict=True), 1):
        body = functools.partial(work, *work_args)
        tasks.append(task.machine.spawn(task.program, f"{work.__name__} {number}", body, 32 * warps))
        tasks[-1].seen, tasks[-1].seen_by_tma, tasks[-1].fenced = task.seen, task.seen_by_tma, task.fenced
    part, task.part = task.part, f"{function.__name__} 0"
    function(*args)
    task.part = part
    task.wait(lambda: all(other.done for other in tasks), "its other warp groups")


def _no_layout(*_: Any, **__: Any) -> None:
    return None


class Namespace:
    """In the place of a module of Triton: the operations above, and the module's own dtypes."""

    def __init__(self, module: Any, **operations: Any) -> None:
        self._module = module
        self.__dict__.update(operations)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, tl.dtype | type(tl.PropagateNan)):
            return found
        raise NotImplementedError(f"{self._module.__name__}.{name} isn't emulated")


LANGUAGE = {
    "arange": arange, "full": full, "zeros": zeros, "where": where, "minimum": minimum, "maximum": maximum,
    "clamp": clamp, "abs": absolute, "exp": exp, "cdiv": cdiv, "cast": cast, "sum": sum_of, "max": max_of,
    "min": min_of, "reduce": reduce, "associative_scan": associative_scan, "cumsum": cumsum, "dot": dot,
    "trans": trans, "reshape": lambda x, *shape: x.reshape(*shape), "permute": lambda x, *order: x.permute(*order),
    "split": lambda x: x.split(), "convert_layout": convert_layout, "range": loop, "static_range": static_range,
    "static_assert": static_assert, "program_id": program_id, "num_programs": num_programs, "load": load,
    "store": store, "atomic_add": atomic_add, "debug_barrier": debug_barrier, "thread_barrier": debug_barrier,
    "barrier": debug_barrier, "inline_asm_elementwise": inline_asm_elementwise,
    "allocate_shared_memory": allocate_shared_memory, "warp_specialize": warp_specialize,
    **dict.fromkeys(
        ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout"),
        _no_layout,
    ),
}  # fmt: skip
MBARRIER = {
    "MBarrierLayout": _no_layout, "init": barrier_init, "arrive": barrier_arrive, "expect": barrier_expect,
    "wait": barrier_wait,
}  # fmt: skip
SHARED = {"reinterpret": Memory.reinterpret, "_reinterpret": Memory.reinterpret}
TMA = {"async_load": load_tile, "async_copy_global_to_shared": load_tile}
ASYNC_COPY = {
    "async_load": load_rows, "async_copy_global_to_shared": load_rows, "mbarrier_arrive": arrive_after_rows,
}  # fmt: skip
HOPPER = {
    "fence_async_shared": fence_async_shared, "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
}  # fmt: skip
CUDA = {"gdc_wait": gdc_wait, "gdc_launch_dependents": gdc_launch_dependents}
